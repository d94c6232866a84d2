"""`Sections`: results by workload, in one page; those of workloads that are not measured again stay."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workloads import DEMO_MODEL, DRAFT, LARGE_SHAPE, SHAPE, TARGET, Workload

Job = tuple[str, Path, Path | None, Workload]
"""A label, a model, its draft model, and rows for it."""


def jobs(only: str) -> Iterator[Job]:
    """All of them, or those whose labels are in `only`, with commas between. `SystemExit` for a label that is none."""
    found = [(TARGET, DRAFT, workload) for workload in DEMO_MODEL] + [
        (SHAPE, None, workload) for workload in LARGE_SHAPE
    ]
    labelled = {f"{model.name}/{workload.name}": (model, draft, workload) for model, draft, workload in found}
    wanted = only.split(",") if only else list(labelled)
    if unknown := set(wanted) - set(labelled):
        raise SystemExit(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(labelled)}")
    for label in wanted:
        yield label, *labelled[label]


class Sections:
    """Written as `output` with .json and .md, at every change."""

    def __init__(self, output: Path, title: str, about: str) -> None:
        self._json, self._page = output.with_suffix(".json"), output.with_suffix(".md")
        self._head = [f"# {title}", "", about, ""]
        self._found: dict[str, dict[str, Any]] = json.loads(self._json.read_text()) if self._json.exists() else {}

    def put(self, label: str, about: str, lines: list[str], **figures: Any) -> None:
        """What was measured: lines for the page, figures for machines."""
        self._found[label] = {"about": f"{about[0].upper()}{about[1:]}", "lines": lines, **figures}
        self._json.write_text(json.dumps(self._found, indent=1) + "\n")
        self._page.write_text(self.text())

    def text(self) -> str:
        """The page."""
        lines = list(self._head)
        for name, section in self._found.items():
            lines += ["## " + name, "", section["about"], "", *section["lines"], ""]
        return "\n".join(lines)
