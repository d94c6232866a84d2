"""A job that is killed, or whose disk fails, at any of its system calls that change or sync a file of its run.

strace counts the calls of an undisturbed run, which are nearly the same each time, and injects a signal or an error at
one of them in later runs; one that hit another file is run again. After each the same command ends with the same
output, and computes again at most what one part holds. The engine computes nothing, and keeps a list of what it was
given.
"""

import errno
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from killed_jobs import Job, make_job

pytestmark = [
    pytest.mark.long(minutes=2),
    pytest.mark.skipif(shutil.which("strace") is None and not os.environ.get("CI"), reason="strace is not installed"),
]
CHANGING = ("mkdir", "openat", "write", "fsync", "link", "rename", "unlink", "close")


@dataclass(frozen=True)
class Call:
    """The `number`-th call of this name in a run; what it is about."""

    name: str
    number: int
    text: str

    @property
    def about(self) -> set[str]:
        """The files of the run that it names, without the process ids in their names."""
        return set(re.findall(r"out\.[\w./]*(?:-\d+)?", self.text))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def calls(job: Job) -> list[Call]:
    """The calls of an undisturbed run that are about its own files."""
    job.clear()
    log = job.folder / "calls"
    assert job.run("strace", "-y", "-o", str(log), "-e", f"trace={','.join(CHANGING)}") == 0
    assert set(job.computed().values()) == {1}
    numbers: Counter[str] = Counter()
    found = []
    for line in log.read_text().splitlines():
        if (name := re.match(r"\w+", line)) is not None:
            numbers[name[0]] += 1
            if "out.run" in line or "out.parquet" in line:
                found.append(Call(name[0], numbers[name[0]], line))
    assert set(CHANGING) == {call.name for call in found}
    return found


def changes(call: Call) -> bool:
    """Whether files are others after it, or as good as on disk. Of parts, the first one and the last stand for all."""
    if "part-000002" in call.text:
        return False
    return call.name not in ("openat", "close") or "O_CREAT" in call.text


def inject(job: Job, call: Call, what: str) -> int:
    """The exit code of a run in which `what` was done to `call`. Between two runs, pipes closed sooner or later can
    move its number by one."""
    log = job.folder / "injected"
    for moved in 3 * (0, -1, 1):
        job.clear()
        when = f"inject={call.name}:{what}:when={call.number + moved}"
        code = job.run("strace", "-y", "-o", str(log), "-e", f"trace={call.name}", "-e", when)
        if Call(call.name, call.number, hit(log)).about == call.about:
            return code
    raise AssertionError(f"not hit in nine runs: {call}, but {hit(log)}")


def hit(log: Path) -> str:
    """The call that was injected into: the last one where that killed the process."""
    lines = [line for line in log.read_text().splitlines() if line[0].isalpha()]
    return next((line for line in lines if "(INJECTED)" in line), lines[-1])


def test_killed_at_any_call(job: Job, calls: list[Call]) -> None:
    chosen = [call for call in calls if changes(call)]
    assert len(chosen) > 30
    for call in chosen:
        assert inject(job, call, "signal=SIGKILL") == -signal.SIGKILL, call
        job.check()
    print(f"{len(chosen)} points killed, {2 * len(chosen)} runs, 0 rows lost, 0 rows doubled")


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (errno.ENOSPC, ("mkdir", "openat", "write", "link", "rename")),
        (errno.EIO, ("write", "fsync", "close", "unlink")),
    ],
)
def test_a_disk_that_fails_at_any_call(job: Job, calls: list[Call], error: int, names: tuple[str, ...]) -> None:
    chosen = [
        call
        for call in calls
        if call.name in names and "ENOENT" not in call.text and "part-000002" not in call.text
        if call.name != "openat" or "O_CREAT" in call.text
        if call.name != "close" or re.search(r"tmp/part-|\.tmp|merged", call.text)
    ]
    assert len(chosen) > 8
    codes = Counter(inject_error(job, call, error) for call in chosen)
    print(f"{len(chosen)} points failed with {errno.errorcode[error]}: exit codes {dict(codes)}, 0 rows lost")


def inject_error(job: Job, call: Call, error: int) -> int:
    code = inject(job, call, f"error={errno.errorcode[error]}")
    # What a log or a lock needs is no part of the result: a job may also go on without.
    assert code in (74, 0), (call, code, (job.folder / "errors").read_text())
    job.check()
    return code


def test_two_runs_at_once(job: Job) -> None:
    job.clear()
    runs = [job.start() for _ in range(2)]
    assert sorted(process.wait(timeout=60) for process in runs) == [0, 75]
    job.check()


def test_one_that_stands_still_and_goes_on(job: Job) -> None:
    job.clear()
    process = job.start()
    parts = job.output.with_suffix(".run") / "parts"
    while not list(parts.glob("part-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert job.run() == 75, "it still holds the folder"
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    job.check()
