"""A job in a process of its own, which tests kill."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.json
import pyarrow.parquet as pq
from stub_jobs import ENGINES, SCRIPT, expected, make_model, prompts, write

from batchinfer.jobs.verify import verify

ROWS, PART_ROWS = 48, 16
STEPS_AHEAD = 5  # of 4 rows each: what the engine ends while the job commits, and after the job was killed
RECORDING = """
class Records(Slow):
    def step(self):
        done = super().step()
        with open(os.environ["COMPUTED"], "a") as file:
            file.write("".join(f"{row}\\n" for row in done.rows))
        return done
"""


@dataclass(frozen=True)
class Job:
    """A command, in a folder that is made anew for each use."""

    folder: Path
    name: str = "out.parquet"  # of the output

    @property
    def output(self) -> Path:
        return self.folder / self.name

    def clear(self) -> None:
        self.output.unlink(missing_ok=True)
        shutil.rmtree(self.output.with_suffix(".run"), ignore_errors=True)
        (self.folder / "computed").write_text("")

    def start(self, *tracing: str) -> subprocess.Popen[bytes]:
        """Begin the command, under what `tracing` names."""
        script = [sys.executable, "main.py", ".", "run", "in.parquet", "-o", self.name]
        flags = ["--model", ".", "--commit-rows", str(PART_ROWS), "--max-tokens", "8"]
        environment = {**os.environ, "COMPUTED": str(self.folder / "computed")}
        with (self.folder / "errors").open("wb") as errors:
            return subprocess.Popen(
                [*tracing, *script, *flags], cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def run(self, *tracing: str) -> int:
        """Its exit code, minus the number of a signal that ended it."""
        return self.start(*tracing).wait(timeout=120)

    def computed(self) -> Counter[int]:
        """How often each row was computed."""
        return Counter(map(int, (self.folder / "computed").read_text().split()))

    def check(self) -> None:
        """The same command ends, with the right output, and has computed little twice."""
        committed = {
            row
            for part in (self.output.with_suffix(".run") / "parts").glob("part-*")
            for row in pq.read_table(part, columns=["row"])["row"].to_pylist()
        }
        if self.output.exists():
            verify(self.output)  # complete or not there
        assert self.run() == 0, (self.folder / "errors").read_text()
        computed = self.computed()
        assert all(computed[row] == 1 for row in committed), "what is committed is never computed again"
        assert sum(computed.values()) - ROWS <= PART_ROWS + 4 * STEPS_AHEAD
        verify(self.output)
        read = pyarrow.json.read_json if self.output.suffix == ".jsonl" else pq.read_table
        answers = read(self.output)["generated_text"].to_pylist()
        assert answers == expected(self.folder, prompts(ROWS))


def make_job(folder: Path, output: str = "out.parquet") -> Job:
    make_model(folder)
    write(folder / "in.parquet", prompt=prompts(ROWS))
    # Where pandas is installed, pyarrow loads it: half a second of each process. batchinfer does not bring it.
    (folder / "pandas.py").write_text("raise ImportError")
    (folder / "engines_of_the_test.py").write_text(ENGINES + RECORDING)
    # Without beats by the clock, a run makes the same calls each time.
    calm = "from batchinfer.jobs import heartbeat\nheartbeat.BEAT_SECONDS = 3600.0\n"
    (folder / "main.py").write_text(calm + textwrap.dedent(SCRIPT).replace(":Slow", ":Records"))
    return Job(folder, output)
