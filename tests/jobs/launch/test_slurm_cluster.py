"""Jobs on a real Slurm of one machine: tasks that are preempted, meet their time limit or are cancelled.

Each cluster has its own folder, ports and key, and is stopped by the process ids in its own files. A task that is
started again would wait two minutes, for old credentials to expire: the tests shorten that, as an operator could.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stub_jobs import ENGINES, SCRIPT, expected, make_model, prompts, write

from batchinfer.jobs.launch import slurm
from batchinfer.jobs.launch.slurm import Submission
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.verify import verify

pytestmark = pytest.mark.long(minutes=2)

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SHARDS, ROWS = 2, 400
# Of 4 rows: a shard takes 80 s, and is told to stop 30 to 60 s after its start, Slurm's clock being as coarse as that.
STEP_SECONDS = 1.6
LIMIT = "3"  # minutes

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=3 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
{more}
"""

# One starts tasks again that end with 75, and tells them at once that they are preempted. The other does neither: its
# tasks hear of it when their time is over, each process of them.
SITES = {
    "requeue-exit": "RequeueExit=75\nSlurmctldParameters=preempt_send_user_signal",
    "plain": "",
}


def eventually(what: str, holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.3)


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@dataclass(frozen=True)
class Task:
    """A job that has not ended, a task of an array apart from the others."""

    id: str  # ARRAY_INDEX, or the job's own
    state: str
    reason: str


def queue() -> list[Task]:
    lines = slurm_says("squeue", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
    return [Task(*line.strip().split("|")) for line in lines]


def states(job: str) -> dict[str, str]:
    """By index of the task."""
    return {task.id.partition("_")[2]: task.state for task in queue() if task.id.partition("_")[0] == job}


def ended(job: str) -> tuple[str, int]:
    """(its state, how often it was started again) of a job or a task."""
    shown = slurm_says("scontrol", "show", "job", job)
    state, restarts = re.search(r"JobState=(\w+)", shown), re.search(r"Restarts=(\d+)", shown)
    assert state is not None and restarts is not None, shown
    return state[1], int(restarts[1])


def all_ended() -> bool:
    """Lets those begin that wait for their credentials only; with some seconds that pass, the new ones are younger."""
    left = queue()
    if waiting := [task for task in left if task.reason == "BeginTime"]:
        time.sleep(5)
    for task in waiting:
        slurm_says("scontrol", "update", f"JobId={task.id}", "StartTime=now")
    return not left


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_cluster(folder: Path, more: str) -> None:
    """In the background; each daemon leaves its process id in a file."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=free_ports(2), more=more)
    (folder / "slurm.conf").write_text(config)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
    files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    slurm_says("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
    for daemon in (["slurmctld", "-c"], ["slurmd"]):
        slurm_says(*daemon, "-f", str(folder / "slurm.conf"))


def node_is_idle() -> bool:
    found = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=60)
    return set(found.stdout.split()) == {"idle"}


def stop_cluster(folder: Path) -> None:
    """The jobs first, whose processes would outlive the daemons; the daemons whatever becomes of the jobs."""
    try:
        if (folder / "slurmctld.pid").exists():
            eventually("no job is left", cancelled_all, 60)
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            if (folder / f"{name}.pid").exists():
                stop_process(int((folder / f"{name}.pid").read_text()))


def cancelled_all() -> bool:
    slurm_says("scancel", f"--user={getpass.getuser()}")
    return not queue()


def stop_process(pid: int) -> None:
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.1)


@pytest.fixture(scope="module", params=SITES)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a cluster that Slurm's commands find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            message = f"{', '.join(missing)} missing: apt-get install --no-install-recommends slurm-wlm munge"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        folder = tmp_path_factory.mktemp("slurm")
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            start_cluster(folder, SITES[request.param])
            eventually("the node is idle", node_is_idle, 60)
            yield folder
        finally:
            stop_cluster(folder)


@pytest.fixture
def job(tmp_path: Path) -> Submission:
    """Its engine computes nothing, slowly."""
    make_model(tmp_path)
    write(tmp_path / "in.parquet", prompt=prompts(ROWS), id=list(range(ROWS)))
    (tmp_path / "engines_of_the_test.py").write_text(f"{ENGINES}\nclass Crawls(Slow):\n    SECONDS = {STEP_SECONDS}\n")
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT).replace(":Slow", ":Crawls"))
    return Submission(
        command=[sys.executable, str(tmp_path / "main.py"), str(tmp_path)],
        arguments=["in.parquet", "-o", "out.parquet", "--model", ".", "--max-tokens", "8", "--commit-rows", "12"],
        folder=tmp_path,
        output=tmp_path / "out.parquet",
        count=SHARDS,
        options=[f"--time={LIMIT}"],
    )


def outputs(job: Submission) -> list[Path]:
    return [sharded(job.output, index, SHARDS) for index in range(SHARDS)]


def log(job: Submission, index: int) -> str:
    return (job.scripts_folder / f"shard-{index}.log").read_text()


def parts(output: Path) -> int:
    return len(list((output.with_suffix(".run") / "parts").glob("part-*")))


def test_tasks_that_are_ended_early_go_on(cluster: Path, job: Submission) -> None:
    array, merge = slurm.submit(job)
    eventually("each shard has a part", lambda: all(map(parts, outputs(job))))
    assert states(array) == {"0": "RUNNING", "1": "RUNNING"}

    slurm_says("sbatch", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 5")
    eventually("a task is preempted", lambda: "PENDING" in states(array).values())
    found = states(array)
    other, preempted = sorted(found, key=lambda index: found[index], reverse=True)
    assert found == {preempted: "PENDING", other: "RUNNING"} and ended(f"{array}_{other}") == ("RUNNING", 0)
    assert "stopped after" in log(job, int(preempted)), "it had time to commit"
    assert "stopped after" not in log(job, int(other))

    eventually("all jobs have ended", all_ended)
    for index, output in enumerate(outputs(job)):
        state, restarts = ended(f"{array}_{index}")
        assert state == "COMPLETED" and restarts >= log(job, index).count("stopped after") > 0, log(job, index)
        assert read_report(output).rows_resumed > 0
        verify(output)
    assert ended(merge) == ("COMPLETED", 0)
    check_merged(job)

    before = [log(job, index).count("complete already") for index in range(SHARDS)]
    again = slurm.submit(job)
    eventually("all jobs have ended", all_ended)
    assert [ended(found) for found in again] == [("COMPLETED", 0)] * 2
    assert [log(job, index).count("complete already") for index in range(SHARDS)] == [count + 1 for count in before]
    check_merged(job)


def check_merged(job: Submission) -> None:
    merged = pq.read_table(job.output)
    assert merged["id"].to_pylist() == list(range(ROWS))
    assert merged["generated_text"].to_pylist() == expected(job.folder, prompts(ROWS))


def test_a_task_that_is_cancelled_stays_so(cluster: Path, job: Submission) -> None:
    array, merge = slurm.submit(job)
    eventually("each shard has a part", lambda: all(map(parts, outputs(job))))
    slurm_says("scancel", f"{array}_0")
    eventually("it has ended", lambda: states(array).get("0") in (None, "PENDING"))
    assert "0" not in states(array) and ended(f"{array}_0") == ("CANCELLED", 0), log(job, 0)
    assert "stopped after" in log(job, 0), "what it had finished is committed"
    assert states(array) == {"1": "RUNNING"}
    slurm_says("scancel", f"{array}_1")
    eventually("all jobs have ended", all_ended)
    assert ended(f"{array}_1") == ("CANCELLED", 0) and ended(merge)[0] == "FAILED"
    assert "manifest.json does not exist: the job is not complete" in (job.scripts_folder / "merge.log").read_text()
    assert not job.output.exists()
