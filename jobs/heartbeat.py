"""The heartbeat of a job: `OUT.run/heartbeat.json`, from which other processes tell how the job goes."""

import json
from dataclasses import asdict, dataclass
from errno import ESTALE
from pathlib import Path
from time import time
from types import TracebackType
from typing import Any

from batchinfer.errors import Refused
from batchinfer.host.process_name import ProcessName
from batchinfer.jobs.log import say
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.results.durable import replace_unsynced
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.run_state import RunState, peaks

SCHEMA_VERSION = 1
BEAT_SECONDS = 2.0
STALE_READS = 3


@dataclass(frozen=True)
class Beat:
    """The fields of `heartbeat.json`. Counts include the rows of earlier runs; rates and peaks are of this run."""

    schema_version: int
    process: ProcessName
    beat: int  # 1, 2, 3 and so on in each run
    written: float  # Unix time
    beat_seconds: float  # usual time between two beats; a step that takes long, as a commit may, delays one
    started: float  # Unix time
    seconds: float  # since the run began
    phase: str  # reading, canary, loading, generating, merging or done
    rows: int | None  # of the input
    rows_done: int
    rows_failed: int
    rows_by_error: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    rows_per_second: float | None  # since the engine is ready; None before
    tokens_per_second: float | None  # computed, of prompts and answers together
    time_left: TimeLeft | None  # of generating; None in other phases, and before a row has ended
    peak_memory_bytes: dict[str, int]  # keys: parent (the job's process), engine, and gpu if it was used
    last_commit: float | None  # Unix time of the last part; None if this run has written none
    exit_code: int | None  # None while the run is at work
    error_class: str | None  # of the error that ended the run
    error: str | None  # in one line, without any text of a row

    @classmethod
    def of(cls, state: RunState, process: ProcessName, number: int) -> "Beat":
        """Return what is known now."""
        results, pace = state.results, state.pace
        left = None
        if state.rows is not None and pace is not None and state.phase == "generating":
            left = pace.left(state.rows - state.rows_done)
        return cls(
            schema_version=SCHEMA_VERSION,
            process=process,
            beat=number,
            written=time(),
            beat_seconds=BEAT_SECONDS,
            started=state.started,
            seconds=state.seconds,
            phase=state.phase,
            rows=state.rows,
            rows_done=state.rows_done,
            rows_failed=0 if results is None else results.failed,
            rows_by_error={} if results is None else dict(results.by_error),
            prompt_tokens=0 if results is None else results.prompt_tokens,
            completion_tokens=0 if results is None else results.completion_tokens,
            rows_per_second=None if pace is None else pace.rows_per_second,
            tokens_per_second=None if pace is None else pace.tokens_per_second,
            time_left=left,
            peak_memory_bytes=peaks(state.stats),
            last_commit=None if results is None else results.committed,
            exit_code=state.exit_code,
            error_class=state.error_class,
            error=state.error,
        )


class Heartbeat:
    """Writes the file from `begin` on: at each `write`, at each `tick` that is due, and when the run ends.

    If the file cannot be written, the job prints one line and continues.
    """

    def __init__(self, folder: RunFolder, state: RunState) -> None:
        self._folder, self._state = folder, state
        self._process = ProcessName.own()
        self._begun = False
        self._number = 0
        self._due = 0.0
        self._complained = False

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder.path.exists():  # a run that is refused before its first part leaves none
            self.write()

    def begin(self, phase: str) -> None:
        """Write the first beat, or that of another phase. No other run can be at work in the folder any more."""
        self._state.phase, self._begun = phase, True
        self.write()

    def tick(self) -> None:
        """Write a beat if it is due."""
        if self._state.clock() >= self._due:
            self.write()

    def write(self) -> None:
        """Write a beat, unless the run has not begun."""
        if not self._begun:
            return
        self._number += 1
        self._due = self._state.clock() + BEAT_SECONDS
        beat = Beat.of(self._state, self._process, self._number)
        path = self._folder.heartbeat
        try:  # not synced: after a loss of power nobody asks whether the process still runs
            replace_unsynced(path, (json.dumps(asdict(beat), ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            if not self._complained:
                say(f"{path} cannot be written: {error.strerror or error}; the job continues", level="warning")
            self._complained = True


def read_beat(path: Path) -> Beat | None:
    """Return the last beat that a job has written; None if it has written none.

    Raises `Refused` if the file is damaged or has another schema version, and `OSError` if it cannot be read.
    """
    try:
        values: dict[str, Any] = json.loads(_read(path))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise Refused(f"{path} has schema_version {version}; this batchinfer reads only {SCHEMA_VERSION}")
        left = values["time_left"]
        parts = {
            "process": ProcessName(**values["process"]),
            "time_left": None if left is None else TimeLeft(**left),
        }
        return Beat(**{**values, **parts})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"{path} is damaged ({type(error).__name__})") from error


def _read(path: Path) -> bytes:
    """Read a file. Over NFS it is stale if it was replaced since it was opened: then it is opened again."""
    for _ in range(STALE_READS):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != ESTALE:
                raise
    return path.read_bytes()
