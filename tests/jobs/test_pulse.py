"""Whether a job is alive, judged by its heartbeat."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from batchinfer.host.process_name import ProcessName
from batchinfer.jobs.heartbeat import BEAT_SECONDS, Beat
from batchinfer.jobs.pulse import LATE_BEATS, PATIENCE_BEATS, Life, Pulse
from batchinfer.jobs.run_state import RunState

LIMIT = LATE_BEATS * BEAT_SECONDS
PATIENCE = PATIENCE_BEATS * BEAT_SECONDS
ELSEWHERE = replace(ProcessName.own(), host="another")


@dataclass
class Job:
    """A job on another machine, seen from one whose clock is `ahead` seconds ahead; time passes while one sleeps."""

    ahead: float = 0.0
    beats_until: float = float("inf")
    seconds: float = 5000.0
    process: ProcessName = ELSEWHERE

    def read(self) -> Beat:
        number = int(min(self.seconds, self.beats_until) // BEAT_SECONDS)
        return replace(Beat.of(RunState(), self.process, number), written=number * BEAT_SECONDS)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    @property
    def pulse(self) -> Pulse:
        return Pulse(lambda: 77 + self.seconds, lambda: self.seconds + self.ahead, self.sleep)


def judged(job: Job, pulse: Pulse) -> tuple[Life, float]:
    """(what is found, how long it took)."""
    began = job.seconds
    _, life = pulse.judge(job.read)
    return life, job.seconds - began


def test_where_the_clocks_agree_a_fresh_beat_is_enough() -> None:
    job = Job(seconds=5001.0)
    life, took = judged(job, job.pulse)
    assert life.alive and life.silent == pytest.approx(1.0) and took == 0


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_where_they_do_not_the_next_beat_is_waited_for(ahead: float) -> None:
    job = Job(ahead)
    life, took = judged(job, job.pulse)
    assert life.alive and 0 < took <= BEAT_SECONDS + 0.5


@pytest.mark.parametrize(("ahead", "silent"), [(0.0, LIMIT + 3), (-3600.0, PATIENCE), (3600.0, 3600.0 + LIMIT + 3)])
def test_a_heartbeat_that_stands_still_is_dead(ahead: float, silent: float) -> None:
    job = Job(ahead, beats_until=5000.0 - LIMIT - 3)
    life, took = judged(job, job.pulse)
    assert not life.alive and took == pytest.approx(PATIENCE, abs=0.5)
    assert life.silent == pytest.approx(silent, abs=BEAT_SECONDS)


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_who_watches_waits_once_and_notices_when_it_dies(ahead: float) -> None:
    job = Job(ahead, beats_until=5100.0)
    pulse = job.pulse
    judged(job, pulse)
    while job.seconds < 5100.0 + LIMIT - BEAT_SECONDS:
        life, took = judged(job, pulse)
        assert life.alive and took == 0
        job.sleep(2.0)
    job.sleep(3 * BEAT_SECONDS)
    life, took = judged(job, pulse)
    assert not life.alive and took == 0


@pytest.mark.parametrize(
    ("process", "alive"),
    [
        (lambda: ProcessName.own(), True),
        (lambda: replace(ProcessName.own(), started=1), False),
        (lambda: replace(ProcessName.own(), pid=2**22 + 1), False),  # beyond what Linux gives
    ],
)
def test_on_its_own_machine_the_process_tells_at_once(process: Callable[[], ProcessName], alive: bool) -> None:
    for beats_until in (0.0, 5000.0):
        job = Job(beats_until=beats_until, process=process())
        life, took = judged(job, job.pulse)
        assert life.alive is alive and took == 0 and life.silent == pytest.approx(5000 - beats_until)
