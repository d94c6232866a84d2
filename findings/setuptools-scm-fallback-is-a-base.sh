#!/usr/bin/env bash
# setuptools-scm's `fallback_version` is documented as the version for where no source of versions works. With 10.3.4 it
# is also the base to count from in a git repository that merely has no tag yet. A fallback that says so in its local
# part, "0+unknown", makes such a repository's second commit 1.dev2+unknown.gHASH: a first release that never was, and
# "unknown" beside a hash that is known. Without the setting the same repository is 0.1.dev2+gHASH.
# Guess written down before: the fallback is used only where there is no git, and the repository is 0.1.dev2+gHASH.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet setuptools-scm==10.3.4 setuptools==84.2.1
mkdir "$folder/project"
cd "$folder/project"
git init --quiet
for message in first second; do
    git -c user.name=someone -c user.email=someone@example.org commit --quiet --allow-empty -m $message
done
version() {
    printf '[build-system]\nrequires = ["setuptools-scm"]\n[project]\nname = "p"\ndynamic = ["version"]\n[tool.setuptools_scm]\n%s\n' "$1" > pyproject.toml
    "$folder/venv/bin/python" -m setuptools_scm 2>/dev/null
}
plain=$(version '')
fallback=$(version 'fallback_version = "0+unknown"')
echo "no fallback: $plain; fallback 0+unknown: $fallback"
[[ $plain == 0.1.dev2+g* ]] || { echo "changed: without the setting"; exit 1; }
[[ $fallback == 1.dev2+unknown.g* ]] || { echo "changed: with the setting"; exit 1; }
