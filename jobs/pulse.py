"""Judging from its heartbeat whether a job is alive, also from another machine whose clock differs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from batchinfer.jobs.heartbeat import Beat

LATE_BEATS = 15  # a heartbeat that is older than so many beats is late
PATIENCE_BEATS = 5  # so many are waited for where the clocks may differ
LOOK_SECONDS = 0.5  # between two looks meanwhile


@dataclass(frozen=True)
class Life:
    """Whether a job is alive, and why that is known."""

    alive: bool
    silent: float  # seconds since its last beat
    reason: str


class Pulse:
    """Judges the beats of one job, one `judge` after the other.

    On the machine that the job runs on, its process tells. Elsewhere the age of the beat does, if it is that of a job
    alive. If it is not, the job is dead or the clocks differ: then the file is read again for a while. From the second
    call on only this machine's clock counts. `clock` returns seconds, `now` the Unix time.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock, self._now, self._sleep = clock, now, sleep
        self._last: tuple[object, ...] | None = None  # names the last beat that was seen
        self._heard = 0.0  # when it was written, by `clock`

    def judge(self, read: Callable[[], Beat]) -> tuple[Beat, Life]:
        """Return the last beat that `read` returns, and whether its job is alive. May take some beats."""
        beat = read()
        age = self._now() - beat.written
        runs = beat.process.runs()
        if runs is not None:
            where = f"process {beat.process.pid} on this machine"
            return beat, Life(runs, max(age, 0.0), f"{where} {'runs' if runs else 'is gone'}")
        limit = LATE_BEATS * beat.beat_seconds
        if self._last is None:
            self._last, self._heard = _name(beat), self._clock() - max(age, 0.0)
            if not 0 <= age <= limit:
                return self._watched(read, beat, age)
        elif _name(beat) != self._last:
            self._last, self._heard = _name(beat), self._clock()
        silent = self._clock() - self._heard
        return beat, _by_beat(beat, silent <= limit, silent)

    def _watched(self, read: Callable[[], Beat], beat: Beat, age: float) -> tuple[Beat, Life]:
        """Look for another beat. `age` is that of this one by a clock that may differ from the job's."""
        began = self._clock()
        while (watched := self._clock() - began) < PATIENCE_BEATS * beat.beat_seconds:
            self._sleep(LOOK_SECONDS)
            newer = read()
            if _name(newer) != self._last:
                return newer, _by_beat(newer, True, 0.0)
        return beat, _by_beat(beat, False, max(age, watched))


def _by_beat(beat: Beat, alive: bool, silent: float) -> Life:
    whose = f"the heartbeat of process {beat.process.pid} on {beat.process.host}"
    return Life(alive, silent, f"{whose} {'goes on' if alive else 'stands still'}")


def _name(beat: Beat) -> tuple[object, ...]:
    return beat.process, beat.beat
