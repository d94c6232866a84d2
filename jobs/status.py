"""`batchinfer status`: how the job of an output goes, or how it ended, told from its run folder."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of, in_bytes, in_seconds
from batchinfer.jobs.heartbeat import Beat, read_beat
from batchinfer.jobs.log import printable
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.pulse import Life, Pulse
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.results.output_writer import is_there
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files

WATCH_SECONDS = 2.0
GOES_ON = "the same command goes on where it was"


class Told(Protocol):
    """A status that is printed."""

    @property
    def over(self) -> bool:
        """True if it will not change any more."""

    def text(self) -> str:
        """Return aligned lines."""

    def json(self) -> str:
        """Return a JSON object on one line."""


Read = TypeVar("Read", bound=Told)


@dataclass(frozen=True)
class Status:
    """How a job goes, or how it ended: what `--json` prints. What is not known is None, or empty."""

    output: str  # of an incremental job, the file that is being run
    state: str  # running, complete, stopped (by an error, or as it was told), dead (without a word), unknown
    reason: str  # why that is so
    phase: str | None = None  # reading, canary, loading, generating, merging or done
    host: str | None = None
    pid: int | None = None
    silent_seconds: float | None = None  # since the last beat, of a job that has not ended
    started: float | None = None  # Unix time of the run's beginning
    seconds: float | None = None  # from then to the last beat, or to the end
    rows: int | None = None  # of the input
    rows_done: int | None = None  # with an answer or an error, those of earlier runs included
    rows_failed: int | None = None
    rows_by_error: dict[str, int] = field(default_factory=dict)
    rows_per_second: float | None = None
    tokens_per_second: float | None = None  # of prompts and answers together
    time_left: TimeLeft | None = None
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    last_commit: float | None = None  # Unix time
    ended: float | None = None  # Unix time
    exit_code: int | None = None
    error_class: str | None = None

    @property
    def over(self) -> bool:
        return self.state != "running"

    def text(self) -> str:
        """Return the status as aligned lines."""
        said = self.reason if self.reason.startswith(self.state) else f"{self.state}: {self.reason}"
        lines = [("output", self.output), ("state", said)]
        if self.state != "complete" and self.phase is not None:
            lines.append(("phase", self.phase))
        if self.rows_done is not None and self.rows is not None:
            share = f" ({100 * self.rows_done / self.rows:.1f} %)" if self.rows else ""
            failed = f", {self.rows_failed:,} failed" if self.rows_failed else ""
            lines.append(("rows", f"{self.rows_done:,} of {self.rows:,}{share}{failed}"))
        lines += [(f"  {code}", count_of(rows, "row")) for code, rows in self.rows_by_error.items()]
        if self.rows_per_second is not None and self.tokens_per_second is not None:
            lines += [("rows/s", f"{self.rows_per_second:,.2f}"), ("tokens/s", f"{self.tokens_per_second:,.1f}")]
        if self.state == "running" and self.phase == "generating":
            lines.append(("time left", in_range(self.time_left)))
        memory = [f"{name} {in_bytes(size)}" for name, size in self.peak_memory_bytes.items() if size]
        if memory:
            lines.append(("peak memory", ", ".join(memory)))
        if self.last_commit is not None:
            lines.append(("last commit", _moment(self.last_commit)))
        if self.started is not None:
            lines.append(("begun", _moment(self.started)))
        if self.ended is not None:
            lines.append(("ended", _moment(self.ended)))
        if self.seconds is not None:
            lines.append(("time taken", in_seconds(self.seconds)))
        width = max(len(name) for name, _ in lines)
        return "\n".join(printable(f"{name:<{width}}  {value}") for name, value in lines)

    def json(self) -> str:
        """Return the status as a JSON object on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)


def print_status(output: Path, watch: bool, as_json: bool) -> None:
    """Print the status of the job of `output`; with `watch`, again and again until the job is over.

    Raises `Refused` if no job has begun there.
    """
    print_each(statuses(output) if watch else [read_status(output, Pulse())], watch, as_json)


def print_each(statuses: Iterable[Told], watch: bool, as_json: bool) -> None:
    """Print one status after the other; with `watch`, a terminal shows each in the place of the one before."""
    redraws = sys.stdout.isatty() and not as_json
    for number, status in enumerate(statuses):
        if redraws and watch:
            print("\x1b[H\x1b[J", end="")  # to the upper left corner; clear from there
        elif number and not as_json:
            print()
        print(status.json() if as_json else status.text(), flush=True)


def statuses(output: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[Status]:
    """Yield the status every `WATCH_SECONDS` until the job is over, the last one included."""
    pulse = Pulse()
    return watched(lambda: read_status(output, pulse), sleep)


def watched(read: Callable[[], Read], sleep: Callable[[float], None] = time.sleep) -> Iterator[Read]:
    """Yield what `read` returns every `WATCH_SECONDS` until that is over."""
    while True:
        status = read()
        yield status
        if status.over:
            return
        sleep(WATCH_SECONDS)


def read_status(output: Path, pulse: Pulse) -> Status:
    """Return how the job of `output` goes. Raises `Refused` if no job has begun there."""
    file = _file_of(output)
    folder = RunFolder(file)
    try:
        beat = read_beat(folder.heartbeat)
    except Refused as error:
        return _without_beat(file, folder, str(error))
    if beat is None:
        folder.refuse_unbegun()
        return _without_beat(file, folder, "it left no heartbeat, as jobs of earlier versions do")
    if beat.exit_code is not None:
        return _ended(file, beat)
    first = beat
    beat, life = pulse.judge(lambda: _beat_or_none(folder) or first)
    if beat.exit_code is not None:  # meanwhile
        return _ended(file, beat)
    if not life.alive and beat.phase == "merging" and folder.report.exists() and is_there(file):
        return _complete(file, None)  # killed between the last rename and the last beat
    return _at_work(file, beat, life)


def _file_of(output: Path) -> Path:
    """Return the output itself. Of an incremental one, return the file that is being run, or was run last."""
    files = incremental_files(output)
    if not files:
        return output
    beats = {file: _beat_or_none(RunFolder(file)) for file in files}
    running = [file for file, beat in beats.items() if beat is not None and beat.exit_code is None]
    if unfinished := running or [file for file in files if not file.exists()]:
        return unfinished[0]
    return max(files, key=lambda file: 0.0 if (beat := beats[file]) is None else beat.written)


def _beat_or_none(folder: RunFolder) -> Beat | None:
    try:
        return read_beat(folder.heartbeat)
    except Refused:
        return None


def _without_beat(file: Path, folder: RunFolder, reason: str) -> Status:
    if folder.report.exists() and is_there(file):
        return _complete(file, None)
    return Status(str(file), "unknown", f"{reason}; if it does not run, {GOES_ON}")


def _ended(file: Path, beat: Beat) -> Status:
    if beat.phase != "done":
        earlier = f"; {file} is there, from an earlier run" if is_there(file) else ""
        return _of_beat(file, beat, "stopped", f"{beat.error}; exit code {beat.exit_code}{earlier}", ended=beat.written)
    if is_there(file):
        return _complete(file, beat)
    gone = f"it was complete, and {file} is there no more; the same command writes it again"
    return _of_beat(file, beat, "stopped", gone, ended=beat.written)


def _at_work(file: Path, beat: Beat, life: Life) -> Status:
    if life.alive:
        ago = f"; last beat {_time(life.silent)} ago" if life.silent >= 1.5 * beat.beat_seconds else ""
        return _of_beat(file, beat, "running", f"{life.reason}{ago}", silent=life.silent)
    reason = f"no sign of life for {_time(life.silent)}: {life.reason}; {GOES_ON}"
    return _of_beat(file, beat, "dead", reason, silent=life.silent)


def _of_beat(
    file: Path, beat: Beat, state: str, reason: str, silent: float | None = None, ended: float | None = None
) -> Status:
    known: dict[str, Any] = {each.name: getattr(beat, each.name) for each in fields(Status) if hasattr(beat, each.name)}
    return Status(
        str(file),
        state,
        reason,
        host=beat.process.host,
        pid=beat.process.pid,
        silent_seconds=silent,
        ended=ended,
        **known,
    )


def _complete(file: Path, beat: Beat | None) -> Status:
    """Return the status of a job that is complete, from its report if that can be read."""
    try:
        report: Report = read_report(file)
    except Refused as error:
        known = Status(str(file), "complete", str(error))
        return known if beat is None else _of_beat(file, beat, "complete", str(error), ended=beat.written)
    failed = "" if beat is None or beat.error is None else f"; {beat.error}, exit code {beat.exit_code}"
    return Status(
        output=str(file),
        state="complete",
        reason=f"`batchinfer report {file}` has the rest{failed}",
        phase="done",
        started=None if beat is None else beat.started,
        seconds=report.wall_seconds,
        rows=report.rows,
        rows_done=report.rows,
        rows_failed=report.rows_failed,
        rows_by_error=report.rows_by_error,
        rows_per_second=report.rows_per_second,
        tokens_per_second=report.tokens_per_second["total"],
        peak_memory_bytes=report.peak_memory_bytes,
        ended=report.ended or None,
        exit_code=None if beat is None else beat.exit_code,
        error_class=None if beat is None else beat.error_class,
    )


def in_range(left: TimeLeft | None) -> str:
    """Return a time left as its estimate and range."""
    if left is None:
        return "unknown until a row has ended"
    upper = "or more" if left.high is None else f"to {_time(left.high)}"
    return f"{_time(left.estimate)} ({_time(left.low)} {upper})"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else in_seconds(seconds)


def _moment(unix: float) -> str:
    """Return local time, as 2026-11-24 17:04:31."""
    return datetime.fromtimestamp(unix).isoformat(" ", "seconds")
