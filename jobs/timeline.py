"""`Timeline`: what a job did over time, in a small file of its run folder.

The file holds at most `MOST` samples, however long the job: of more, the two neighbours that together are shortest are
joined, so that all come to span about the same time. It is replaced by rename, so that a job that is killed leaves a
whole one. A job that goes on adds to it; the time between its runs is left out.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from batchinfer.engine.config import EngineStats
from batchinfer.errors import Refused
from batchinfer.jobs.log import say
from batchinfer.jobs.results.durable import replace_unsynced

SCHEMA_VERSION = 1
MOST = 480  # samples in the file, about 40 KB
WRITE_SECONDS = 10.0  # between two writes


@dataclass(frozen=True)
class Sample:
    """What a job did in some seconds of generating."""

    began: float  # Unix time
    seconds: float
    rows: int  # that ended
    prompt_tokens: int  # computed
    completion_tokens: int
    running: float  # rows side by side, in the mean
    kv_cache_used: float  # share of the KV cache that rows had taken, in the mean

    def __add__(self, other: "Sample") -> "Sample":
        """Return both, one after the other, as one."""
        seconds = self.seconds + other.seconds
        share = self.seconds / seconds if seconds > 0 else 0.5
        return Sample(
            self.began,
            seconds,
            self.rows + other.rows,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            share * self.running + (1 - share) * other.running,
            share * self.kv_cache_used + (1 - share) * other.kv_cache_used,
        )


class Timeline:
    """Takes samples of a run, and keeps them with those of earlier runs of the same job.

    `clock` returns seconds. If the file cannot be written, the job prints one line and continues.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self.notes: list[str] = []
        self.samples: list[Sample] = []
        try:
            self.samples = read_timeline(path)
        except Refused as error:
            self.notes.append(f"{error}; the figures over time begin with this run")
        self._last: float | None = None  # when the last sample ended
        self._written = 0.0
        self._complained = False

    def begin(self, rows: int) -> None:
        """Note that generating begins, with `rows` done before. For an engine that replaces the first, do nothing."""
        if self._last is None:
            self._last = self._written = self._clock()
            self._rows, self._stats = rows, EngineStats()

    def add(self, rows: int, stats: EngineStats, ended: float | None = None) -> None:
        """Take a sample: the number of rows that have ended, and the statistics of the engine, since the beginning.

        It is of the time until now, or until `ended` by the clock.
        """
        assert self._last is not None, "a sample before generating began"
        clock = self._clock()
        now = clock if ended is None else max(ended, self._last)
        before, self._stats = self._stats, stats
        sample = Sample(
            time.time() - (clock - self._last),
            now - self._last,
            rows - self._rows,
            stats.prompt_tokens - before.prompt_tokens,
            stats.completion_tokens - before.completion_tokens,
            stats.running,
            stats.kv_cache_used,
        )
        self._last, self._rows = now, rows
        self.samples.append(sample)
        while len(self.samples) > MOST:
            join_shortest(self.samples)
        if now - self._written >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, by rename."""
        if not self.samples:
            return
        self._written = self._clock()
        try:
            write_timeline(self._path, self.samples)
        except OSError as error:
            if not self._complained:
                say(f"{self._path} cannot be written: {error.strerror or error}; the job continues", level="warning")
            self._complained = True


def write_timeline(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, in the order of time, by rename. Raises `OSError`.

    The file is not synced: after a loss of power the figures may be gone, which costs nobody an answer.
    """
    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    replace_unsynced(path, (json.dumps({"schema_version": SCHEMA_VERSION, **columns}) + "\n").encode())


def join_shortest(samples: list[Sample]) -> None:
    """Replace the two neighbours that together are shortest by their sum."""
    seconds = [first.seconds + second.seconds for first, second in pairwise(samples)]
    i = seconds.index(min(seconds))
    samples[i : i + 2] = [samples[i] + samples[i + 1]]


def read_timeline(path: Path) -> list[Sample]:
    """Return the samples of a job in the order of time; none if it has left no file.

    Raises `Refused` if the file is damaged or has another schema version.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise Refused(f"{path} has schema_version {version}; this batchinfer reads only {SCHEMA_VERSION}")
        columns = [[float(value) for value in values[field.name]] for field in fields(Sample)]
        return [_sample(*row) for row in zip(*columns, strict=True)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"{path} is damaged: {error}") from error


def _sample(began: float, seconds: float, rows: float, prompt: float, completion: float, *gauges: float) -> Sample:
    return Sample(began, seconds, int(rows), int(prompt), int(completion), *gauges)
