"""A virtual environment of its own for each peer, in `.env-NAME`, with all that the peer builds.

They lie beside this file, or in the folder that `BATCHINFER_PEERS` names, so that checkouts can share them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("BATCHINFER_PEERS", Path(__file__).parent)).resolve()


class Failed(SystemExit):
    """A command failed, or an engine does not run on this machine; the message says why."""

    @property
    def reason(self) -> str:
        """The last line of the message that names an error, or the last of all."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line or "killed by" in line), lines[-1])


@dataclass(frozen=True)
class Environment:
    """A peer's environment: its name and its packages, each with its version."""

    name: str
    requirements: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()  # packages of which pip shall install nothing but themselves
    unwanted: tuple[str, ...] = ()  # packages that come as dependencies, and are removed again

    @property
    def folder(self) -> Path:
        return FOLDER / f".env-{self.name}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self) -> None:
        """Create the environment, or bring it to the wanted packages; at once done where nothing is missing."""
        installed = self.folder / "installed.txt"
        wanted = [*self.requirements, *self.without_dependencies, *(f"no {package}" for package in self.unwanted)]
        if installed.exists() and installed.read_text().splitlines() == wanted:
            return
        run([sys.executable, "-m", "venv", str(self.folder)])
        pip = [str(self.python), "-m", "pip"]
        run([*pip, "install", "--quiet", *self.requirements])
        if self.without_dependencies:
            run([*pip, "install", "--quiet", "--no-deps", *self.without_dependencies])
        if self.unwanted:
            run([*pip, "uninstall", "--quiet", "--yes", *self.unwanted])
        installed.write_text("\n".join(wanted) + "\n")


def run(command: list[str], variables: Mapping[str, str] | None = None) -> str:
    """Run a command to its end, with these environment variables besides, and return its standard output.

    Raises:
        Failed: the command failed; the message holds the command and the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(variables or {})})
    if done.returncode:
        end_of_output = (done.stdout + done.stderr)[-4000:]
        how = f"\nkilled by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
        raise Failed(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{end_of_output}{how}")
    return done.stdout
