"""Running the shards of a job as tasks on a Ray cluster: each task runs its shard's command line as a child process.

A shard's run folder keeps its state. If a shard was stopped or its worker died, it runs again on any free node and
continues from its run folder. So all nodes must see the same files.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.log import message_of, say
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import JobSpec, sharded

PROGRAM = ("-m", "batchinfer", "run")
"""Python's arguments for a shard's command, before the shard's own arguments."""
POLL_SECONDS = 0.2
CONNECT_SECONDS = 10.0
STOP_SECONDS = 10.0  # time after the job's grace until stopped tasks must have reported their end
LAST_LINE_BYTES = 4096
MAX_PORT = 65535
INTERNAL, IO_ERROR, STOPPED = 70, 74, 75  # exit codes


@dataclass(frozen=True)
class Ended:
    """The end of a shard's command: its exit code, which is negative if it was killed, and a message."""

    code: int
    said: str

    @property
    def unfinished(self) -> bool:
        """True if the same command can continue the shard, since it was stopped or killed."""
        return self.code == STOPPED or self.code < 0

    def __str__(self) -> str:
        return self.said if self.code < 0 else f"exit code {self.code}: {self.said}"


@dataclass(frozen=True)
class Share:
    """The resources of the cluster that a shard takes, and the device that it runs on: cpu or cuda."""

    device: str
    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        return count_of(self.gpus, "GPU") if self.gpus else count_of(self.cpus, "CPU")


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster to use, and how. Raises `UsageError`, naming flag, value and bound, for a wrong value."""

    address: str | None = None  # HOST:PORT; auto: a running one; local: start one; None: Ray's default
    gpus_per_shard: int | None = None  # if both are None, the job's device and the nodes decide
    cpus_per_shard: int | None = None
    max_retries: int = 3  # for each shard

    def __post_init__(self) -> None:
        if self.address not in (None, "auto", "local"):
            host, _, port = str(self.address).rpartition(":")
            if not host or "/" in host or not port.isdecimal() or int(port) > MAX_PORT:
                raise UsageError(f"--address is {self.address!r}; give the head's HOST:PORT, auto or local")
        if self.gpus_per_shard is not None and self.cpus_per_shard is not None:
            raise UsageError("give one of --gpus-per-shard and --cpus-per-shard: a shard runs on one device")
        for flag, value, bound in (
            ("--gpus-per-shard", self.gpus_per_shard, 1),
            ("--cpus-per-shard", self.cpus_per_shard, 1),
            ("--max-retries", self.max_retries, 0),
        ):
            if value is not None and value < bound:
                raise UsageError(f"{flag} is {value}; it must be {bound} or more")

    def share(self, device: str, nodes: Sequence[Mapping[str, float]]) -> Share:
        """Return the resources for each shard of a job with this `--device`, on nodes with these resources.

        By default a shard takes one GPU, if there are GPUs and `device` allows them. Else it takes all CPUs of the
        smallest node, so that it has a node to itself. Raises `UsageError` if the flags ask for another device than
        the job's, and `Refused` if no node has enough.
        """
        wants_cpus = self.cpus_per_shard is not None or device == "cpu"
        if wants_cpus and device == "cuda":
            raise UsageError("--cpus-per-shard is for jobs on the CPU, but --device is cuda; leave one of them out")
        if wants_cpus and self.gpus_per_shard is not None:
            raise UsageError("--gpus-per-shard is for jobs on a GPU, but --device is cpu; leave one of them out")
        gpus = self.gpus_per_shard
        if not wants_cpus and (device == "cuda" or gpus is not None or _most("GPU", nodes)):
            share = Share("cuda", 1, gpus or 1)
        else:
            smallest = int(min((node["CPU"] for node in nodes if node.get("CPU", 0) >= 1), default=1))
            share = Share("cpu", self.cpus_per_shard or smallest)
        for noun, wanted in (("GPU", share.gpus), ("CPU", share.cpus)):
            if wanted > _most(noun, nodes):
                raise Refused(
                    f"a shard takes {count_of(wanted, noun)}, and no node of the cluster has more than "
                    f"{_most(noun, nodes)}: add a larger node, or ask for less"
                )
        return share


def _most(resource: str, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return the most of a resource that any node has."""
    return int(max((node.get(resource, 0) for node in nodes), default=0))


def run_shards(
    spec: JobSpec, arguments: Sequence[str], count: int, cluster: Cluster, program: Sequence[str] = PROGRAM
) -> dict[int, Ended]:
    """Run `program` with `arguments` for each of `count` shards of the job `spec`. Returns how shards failed, by shard,
    in the order of their failures.

    If a shard fails, the others continue. Raises `UsageError` and `Refused` if the cluster cannot be used, and
    `Interrupted` after a signal. Then the shards have committed their finished rows.
    """
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker died
        ray = _connect(cluster.address)
        try:
            share = cluster.share(spec.device, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            say(f"{count_of(count, 'shard')}, each with {share}", "shards")
            # `_watch` runs shards again, not Ray, which would print a traceback for each shard that was stopped.
            task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)(run_shard)

            def start(shard: int) -> Any:
                # --device comes first, so that a device in the arguments overrides it.
                command = [*program, "--device", share.device, "--shard", f"{shard}/{count}", *arguments]
                return task.remote(command, Path.cwd(), sharded(spec.output, shard, count))

            return _watch(ray, start, count, cluster.max_retries, spec.grace)
        finally:
            ray.shutdown()


def run_shard(command: Sequence[str], folder: Path, output: Path) -> Ended:
    """Run Python with `command` in `folder`, as a task. Its output is appended to the log beside the shard's output."""
    log = (folder / output).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # Ray cancels a task in this way
        process.terminate()
        process.wait()
        raise
    if code < 0:
        return Ended(code, f"it was killed by {signal.Signals(-code).name}")
    return Ended(code, _last_line(log) if code else _rows(folder / output))


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINE_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return message_of(lines[-1]) if lines else "its log is empty"


def _connect(address: str | None) -> Any:
    """Connect to Ray. Returns its module. Raises `UsageError` if Ray is not installed, and `Refused` if no Ray
    answers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError("Ray is not installed: run pip install '.[ray]' in batchinfer's checkout") from error
    try:
        if address not in (None, "auto", "local"):  # Ray itself would try for minutes
            host, _, port = str(address).rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "--address" if address is None else f"--address {address}"
        raise Refused(f"{where}: {error}; start a cluster with `ray start`, or give --address local") from error
    return ray


def _watch(ray: Any, start: Callable[[int], Any], count: int, max_retries: int, grace: float) -> dict[int, Ended]:
    """Start the tasks of all shards, wait for them, and print how each ends. Returns the shards that failed."""
    failed: dict[int, Ended] = {}
    retries: Counter[int] = Counter()  # by shard
    with Interruption() as interruption:
        tasks = {start(shard): shard for shard in range(count)}
        while tasks:
            ended, _ = ray.wait(list(tasks), timeout=POLL_SECONDS)
            if interruption.requested:
                _stop(ray, list(tasks), grace)
                done = count - len(tasks)
                raise Interrupted(f"stopped when {done} of {count} shards had ended; give the same command to continue")
            for task in ended:
                shard, end = tasks.pop(task), _end_of(ray, task)
                name = f"shard {shard} of {count}"
                if end.unfinished and retries[shard] < max_retries:
                    retries[shard] += 1
                    say(f"{name} runs again (retry {retries[shard]} of at most {max_retries}): {end}", "shards")
                    tasks[start(shard)] = shard
                elif end.code:
                    failed[shard] = end
                    say(f"{name} failed: {end}", "shards")
                else:
                    say(f"{name} is done: {end.said}", "shards")
    return failed


def _end_of(ray: Any, task: Any) -> Ended:
    try:
        end: Ended = ray.get(task)
        return end
    except ray.exceptions.RayTaskError as error:  # raised by the task itself, for instance for a missing folder
        code = IO_ERROR if isinstance(error.cause, OSError) else INTERNAL
        last = str(error.cause).strip().splitlines()[-1:]
        return Ended(code, f"{type(error.cause).__name__}: {''.join(last)}")
    except ray.exceptions.RayError as error:
        return Ended(-signal.SIGKILL, f"its worker died ({type(error).__name__})")


def _stop(ray: Any, tasks: list[Any], grace: float) -> None:
    """Cancel the tasks, and wait for their commands to commit."""
    for task in tasks:
        ray.cancel(task)
    ray.wait(tasks, num_returns=len(tasks), timeout=grace + STOP_SECONDS)


def _rows(output: Path) -> str:
    report = read_report(output)
    return count_of(report.rows, "row") + (f" ({report.rows_resumed:,} done before)" if report.rows_resumed else "")
