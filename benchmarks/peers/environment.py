"""A virtual environment of its own for each peer, in `.env-NAME` beside this file, with all that the peer builds."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A peer's environment: its name and its packages, each with its version."""

    name: str
    requirements: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()  # packages of which pip shall install nothing but themselves

    @property
    def folder(self) -> Path:
        return Path(__file__).resolve().parent / f".env-{self.name}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self) -> None:
        """Create the environment, or bring it to the wanted packages; at once done where nothing is missing."""
        installed = self.folder / "installed.txt"
        wanted = "\n".join([*self.requirements, *self.without_dependencies]) + "\n"
        if installed.exists() and installed.read_text() == wanted:
            return
        run([sys.executable, "-m", "venv", str(self.folder)])
        pip_install = [str(self.python), "-m", "pip", "install", "--quiet"]
        run([*pip_install, *self.requirements])
        if self.without_dependencies:
            run([*pip_install, "--no-deps", *self.without_dependencies])
        installed.write_text(wanted)


def run(command: list[str]) -> str:
    """Run a command to its end and return its standard output.

    Raises:
        SystemExit: the command failed; the message holds the command and the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        end_of_output = (done.stdout + done.stderr)[-4000:]
        raise SystemExit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{end_of_output}")
    return done.stdout
