"""What a job did so far as a textfile for Prometheus, which node_exporter's textfile collector reads."""

import re
import time
from pathlib import Path
from types import TracebackType

from batchinfer.errors import Refused, exit_code
from batchinfer.jobs.log import say
from batchinfer.jobs.results.collector import Results
from batchinfer.jobs.results.durable import write_whole
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec

PREFIX = "batchinfer_job_"
HELP = {
    "start_time_seconds": "Unix time at which the run began.",
    "seconds": "Seconds that the run took so far.",
    "running": "1 while the run is at work, 0 once it ended.",
    "exit_code": "What the run exited with; absent while it is at work.",
    "last_success_time_seconds": "Unix time at which a run last exited with 0; kept while later runs fail.",
    "rows": "Rows of the input.",
    "rows_done": "Rows with an answer or an error, those of earlier runs included.",
    "rows_failed": "Rows with an error.",
    "prompt_tokens_total": "Tokens of the prompts of the rows done.",
    "completion_tokens_total": "Tokens of the answers of the rows done.",
}


class Metrics:
    """Writes `--metrics-textfile`, where there is one: as the run begins, when `write` is called, and as it ends.

    A run that ends before it has its folder writes how it ended, without rows. Where another run is at work in the
    folder the file is that run's, and stays as it is. The time of the last success is taken over from the file, since
    the alert that too long passed since then must outlast the runs that fail. Where the file cannot be written the job
    goes on, and says so once.
    """

    def __init__(self, spec: JobSpec, folder: RunFolder) -> None:
        """Raises `Refused` where the file has no folder, and `OSError` where an earlier one cannot be read."""
        self._path = spec.metrics_textfile
        output = spec.output.parent if spec.incremental and not spec.grows else spec.output
        self._label = _escaped(str(output.absolute()))
        self._folder = folder
        self._results: Results | None = None
        self._total = 0
        self._complained = False
        self._started, self._clock = time.time(), time.monotonic()
        self._last_success = None if self._path is None else _last_success(self._path)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None or self._folder.taken:
            return
        code = exit_code(Refused() if error is None and self._all_failed else error)
        if code == 0:
            self._last_success = time.time()
        self.write(code)

    def failed(self, error: BaseException) -> None:
        """There was no run, because of this; no other one is at work."""
        self.write(exit_code(error))

    @property
    def _all_failed(self) -> bool:
        return self._results is not None and 0 < self._results.rows == self._results.failed

    def begin(self, results: Results, total: int) -> None:
        """The run has its folder; the input has `total` rows."""
        self._results, self._total = results, total
        self.write()

    def write(self, code: int | None = None) -> None:
        """Write the file, by rename. `code` is what the run exits with; None while it is at work."""
        if self._path is None:
            return
        try:
            write_whole(self._path, self._text(code).encode())
        except OSError as error:
            if not self._complained:
                say(f"--metrics-textfile {self._path} cannot be written: {error.strerror or error}; the job goes on")
            self._complained = True

    def _text(self, code: int | None) -> str:
        values = {
            "start_time_seconds": self._started,
            "seconds": time.monotonic() - self._clock,
            "running": int(code is None),
            "exit_code": code,
            "last_success_time_seconds": self._last_success,
        }
        if self._results is not None:
            values |= {
                "rows": self._total,
                "rows_done": self._results.rows,
                "rows_failed": self._results.failed,
                "prompt_tokens_total": self._results.prompt_tokens,
                "completion_tokens_total": self._results.completion_tokens,
            }
        return "".join(self._family(name, value) for name, value in values.items() if value is not None)

    def _family(self, name: str, value: float) -> str:
        kind = "counter" if name.endswith("_total") else "gauge"
        metric = PREFIX + name
        return f'# HELP {metric} {HELP[name]}\n# TYPE {metric} {kind}\n{metric}{{output="{self._label}"}} {value!r}\n'


def _escaped(label: str) -> str:
    """As the exposition format wants it; bytes of a name that are no UTF-8 become escapes."""
    text = label.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _last_success(path: Path) -> float | None:
    """What an earlier run wrote into the file."""
    if not path.parent.is_dir():
        raise Refused(f"--metrics-textfile {path}: there is no folder {path.parent}; make it, or name another one")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    found = re.search(rb"^batchinfer_job_last_success_time_seconds{.*} (\d+(?:\.\d+)?)$", text, re.MULTILINE)
    return None if found is None else float(found[1])
