"""`RunState`: what is known of a run while it is at work, in one place for all who tell of it."""

import time
from collections.abc import Callable
from types import TracebackType

from batchinfer.engine.config import EngineStats
from batchinfer.errors import Refused, exit_code
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.jobs.collector import Results
from batchinfer.jobs.pace import Pace
from batchinfer.jobs.process.safe_errors import told


class RunState:
    """The state of a run, which the progress line, the metrics file and the heartbeat show.

    As a context it notes how the run ends. `clock` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started = time.time()
        self._began = clock()
        self.phase = "reading"  # then canary, loading, generating, merging, done
        self.rows: int | None = None  # of the input; None until it is read
        self.results: Results | None = None  # None until the run folder is open
        self.stats = EngineStats()  # summed over all engines of the run
        self.pace: Pace | None = None  # None until the engine is ready
        self.exit_code: int | None = None  # None while the run is at work
        self.error_class: str | None = None  # of the error that ended it
        self.error: str | None = None

    def __enter__(self) -> "RunState":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far."""
        return self.clock() - self._began

    @property
    def rows_done(self) -> int:
        return 0 if self.results is None else self.results.rows

    def enter(self, phase: str) -> None:
        """Note that another phase begins."""
        self.phase = phase
        if self.pace is not None:
            self.pace.end()

    def generating(self) -> bool:
        """Note that the engine is ready. Returns False for an engine that replaces the first one."""
        if self.pace is not None:
            return False
        self.phase, self.pace = "generating", Pace(self.rows_done, self.clock)
        return True

    def update(self, stats: EngineStats) -> None:
        """Note the statistics of the engine, those of engines that died included."""
        self.stats = stats
        assert self.pace is not None, "statistics before generating began"
        self.pace.note(self.rows_done, stats.prompt_tokens + stats.completion_tokens)

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended: by an error, or with all rows done, which is a failure if every row failed."""
        if error is None and self.results is not None and 0 < self.results.rows == self.results.failed:
            error = Refused("every row failed")
        self.exit_code = exit_code(error)
        if error is not None:
            self.error_class, self.error = type(error).__name__, told(error)


def peaks(stats: EngineStats) -> dict[str, int]:
    """Return the peak memory in bytes of this process, the engine's, and the GPU if it was used."""
    gpu = {"gpu": stats.peak_device_bytes} if stats.peak_device_bytes else {}
    return {"parent": peak_memory_bytes(), "engine": stats.peak_memory_bytes} | gpu
