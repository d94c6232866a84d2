"""Writing a job's progress to a text file for Prometheus, read by node_exporter's textfile collector."""

import re
import time
from pathlib import Path
from types import TracebackType

from batchinfer.errors import Refused
from batchinfer.jobs.log import say
from batchinfer.jobs.results.durable import write_whole
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.run_state import RunState
from batchinfer.jobs.spec import JobSpec

PREFIX = "batchinfer_job_"
HELP = {
    "start_time_seconds": "Unix time at which the run began.",
    "seconds": "Seconds that the run has taken so far.",
    "running": "1 while the run is at work, 0 once it ended.",
    "exit_code": "Exit code of the run; absent while it is at work.",
    "last_success_time_seconds": "Unix time at which a run last exited with 0; kept while later runs fail.",
    "rows": "Rows of the input.",
    "rows_done": "Rows with an answer or an error, those of earlier runs included.",
    "rows_failed": "Rows with an error.",
    "prompt_tokens_total": "Tokens of the prompts of the rows done.",
    "completion_tokens_total": "Tokens of the answers of the rows done.",
}


class Metrics:
    """Writes the file of `--metrics-textfile`, if it is given: when the run begins, at each `write`, and when it ends.

    A run that ends before it has opened its run folder writes its exit code without rows. If another run is at work in
    the folder, the file belongs to that run and is left alone. The time of the last success is kept from the earlier
    file, so that an alert on its age still works after runs that fail. If the file cannot be written, the job prints
    one line and continues.
    """

    def __init__(self, spec: JobSpec, folder: RunFolder, state: RunState) -> None:
        """Raises `Refused` if the file's folder does not exist, and `OSError` if an earlier file cannot be read."""
        self._path = spec.metrics_textfile
        output = spec.output.parent if spec.incremental and not spec.adds_file else spec.output
        self._label = _escaped(str(output.absolute()))
        self._folder, self._state = folder, state
        self._complained = False
        self._last_success = None if self._path is None else _last_success(self._path)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None or self._folder.taken:
            return
        if self._state.exit_code == 0:
            self._last_success = time.time()
        self.write()

    def write(self) -> None:
        """Write the file, by rename."""
        if self._path is None:
            return
        try:
            write_whole(self._path, self._text().encode())
        except OSError as error:
            if not self._complained:
                say(
                    f"--metrics-textfile {self._path} cannot be written: {error.strerror or error}; the job continues",
                    level="warning",
                )
            self._complained = True

    def _text(self) -> str:
        state = self._state
        values = {
            "start_time_seconds": state.started,
            "seconds": state.seconds,
            "running": int(state.exit_code is None),
            "exit_code": state.exit_code,
            "last_success_time_seconds": self._last_success,
        }
        if state.results is not None:
            values |= {
                "rows": state.rows,
                "rows_done": state.results.rows,
                "rows_failed": state.results.failed,
                "prompt_tokens_total": state.results.prompt_tokens,
                "completion_tokens_total": state.results.completion_tokens,
            }
        return "".join(self._family(name, value) for name, value in values.items() if value is not None)

    def _family(self, name: str, value: float) -> str:
        kind = "counter" if name.endswith("_total") else "gauge"
        metric = PREFIX + name
        return f'# HELP {metric} {HELP[name]}\n# TYPE {metric} {kind}\n{metric}{{output="{self._label}"}} {value!r}\n'


def _escaped(label: str) -> str:
    """Escape a label for the exposition format. Bytes that are not UTF-8 become escapes too."""
    text = label.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _last_success(path: Path) -> float | None:
    """Return the time of the last success that an earlier run wrote, if any. Raises `Refused` if the folder is
    missing."""
    if not path.parent.is_dir():
        raise Refused(f"--metrics-textfile {path}: there is no folder {path.parent}; make it, or name another file")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    found = re.search(rb"^batchinfer_job_last_success_time_seconds{.*} (\d+(?:\.\d+)?)$", text, re.MULTILINE)
    return None if found is None else float(found[1])
