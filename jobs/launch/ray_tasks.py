"""The shards of a job as tasks on a Ray cluster: each runs the command line of its shard as a child process.

What is exact about a job is so by its shards' own run folders. A shard that was stopped, or whose worker died, runs
again on whichever node is free, and goes on where it was: so all nodes must see the same files.
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
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import JobSpec, sharded

PROGRAM = ("-m", "batchinfer", "run")
"""What Python runs for a shard, before the shard's arguments."""
POLL_SECONDS = 0.2
CONNECT_SECONDS = 10.0
STOP_SECONDS = 10.0  # beyond the job's grace: until the tasks have told of it
LAST_LINE_BYTES = 4096
MAX_PORT = 65535
INTERNAL, IO_ERROR, STOPPED = 70, 74, 75  # exit codes


@dataclass(frozen=True)
class Ended:
    """How a shard's command ended: its exit code, less than 0 where it was killed; and what there is to say of it."""

    code: int
    said: str

    @property
    def unfinished(self) -> bool:
        """True where the same command can go on: it was stopped or killed, and found nothing to refuse."""
        return self.code == STOPPED or self.code < 0

    def __str__(self) -> str:
        return self.said if self.code < 0 else f"exit code {self.code}: {self.said}"


@dataclass(frozen=True)
class Share:
    """What a shard takes of the cluster, and the device it runs on: cpu or cuda."""

    device: str
    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        return _counted(self.gpus, "GPU") if self.gpus else _counted(self.cpus, "CPU")


@dataclass(frozen=True)
class Cluster:
    """Which Ray, and how it is used. A `UsageError` names flag, value and bound."""

    address: str | None = None  # HOST:PORT; auto: one that runs; local: one that is started; None: whichever there is
    gpus_per_shard: int | None = None  # None of both: by the job's device and the nodes
    cpus_per_shard: int | None = None
    max_retries: int = 3  # of each shard

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
        """What a shard of a job with that `--device` takes, of nodes with these resources.

        By default one GPU, where there are some and `device` allows it; else the CPUs of the smallest node, so that a
        shard has a node to itself. Raises `UsageError` where that is another device than the job's, and `Refused`
        where no node has so much.
        """
        wants_cpus = self.cpus_per_shard is not None or device == "cpu"
        if wants_cpus and device == "cuda":
            raise UsageError("--cpus-per-shard is for jobs on the CPU; this one has --device cuda")
        if wants_cpus and self.gpus_per_shard is not None:
            raise UsageError("--gpus-per-shard is for jobs on a GPU; this one has --device cpu")
        gpus = self.gpus_per_shard
        if not wants_cpus and (device == "cuda" or gpus is not None or _most("GPU", nodes)):
            share = Share("cuda", 1, gpus or 1)
        else:
            smallest = int(min((node["CPU"] for node in nodes if node.get("CPU", 0) >= 1), default=1))
            share = Share("cpu", self.cpus_per_shard or smallest)
        for noun, wanted in (("GPU", share.gpus), ("CPU", share.cpus)):
            if wanted > _most(noun, nodes):
                raise Refused(
                    f"a shard takes {_counted(wanted, noun)}, and no node of the cluster has more than "
                    f"{_most(noun, nodes)}: start another node, or ask for less"
                )
        return share


def _most(resource: str, nodes: Sequence[Mapping[str, float]]) -> int:
    """Of one node."""
    return int(max((node.get(resource, 0) for node in nodes), default=0))


def run_shards(
    spec: JobSpec, arguments: Sequence[str], count: int, cluster: Cluster, program: Sequence[str] = PROGRAM
) -> dict[int, Ended]:
    """Run `program` with `arguments` for each of `count` shards of the job `spec`; those that failed, first come first.

    Where a shard fails the others go on. Raises `UsageError` and `Refused` for a cluster that is not to be had, and
    `Interrupted` after a signal: then the shards have committed what they had finished.
    """
    with redirect_stdout(sys.stderr):  # where Ray says that a worker died
        ray = _connect(cluster.address)
        try:
            share = cluster.share(spec.device, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            _say(f"{_counted(count, 'shard')}, each with {share}")
            # Whether a shard runs again is for `_watch` to say: Ray would print a traceback for each that was stopped.
            task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)(run_shard)

            def start(shard: int) -> Any:
                # In front, so that a device which the arguments name themselves is the one that counts.
                command = [*program, "--device", share.device, "--shard", f"{shard}/{count}", *arguments]
                return task.remote(command, Path.cwd(), sharded(spec.output, shard, count))

            return _watch(ray, start, count, cluster.max_retries, spec.grace)
        finally:
            ray.shutdown()


def run_shard(command: Sequence[str], folder: Path, output: Path) -> Ended:
    """The task: run Python with `command` in `folder`, and add what it writes to the log beside the shard's output."""
    log = (folder / output).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # that is how Ray cancels a task
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
    return lines[-1].removeprefix("batchinfer: error: ") if lines else "nothing was said"


def _connect(address: str | None) -> Any:
    """The module of Ray, connected. Raises `UsageError` where it is not installed, `Refused` where no Ray answers."""
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
    """Start the tasks of all shards, wait for them, and tell of each that ends; the shards that failed."""
    failed: dict[int, Ended] = {}
    retries: Counter[int] = Counter()  # by shard
    with Interruption() as interruption:
        tasks = {start(shard): shard for shard in range(count)}
        while tasks:
            ended, _ = ray.wait(list(tasks), timeout=POLL_SECONDS)
            if interruption.requested:
                _stop(ray, list(tasks), grace)
                done = count - len(tasks)
                raise Interrupted(f"stopped when {done} of {count} shards had ended; the same command goes on")
            for task in ended:
                shard, end = tasks.pop(task), _end_of(ray, task)
                name = f"shard {shard} of {count}"
                if end.unfinished and retries[shard] < max_retries:
                    retries[shard] += 1
                    _say(f"{name} runs again, {retries[shard]} of {max_retries} times at most: {end}")
                    tasks[start(shard)] = shard
                elif end.code:
                    failed[shard] = end
                    _say(f"{name} failed: {end}")
                else:
                    _say(f"{name} is done: {end.said}")
    return failed


def _end_of(ray: Any, task: Any) -> Ended:
    try:
        end: Ended = ray.get(task)
        return end
    except ray.exceptions.RayTaskError as error:  # raised by the task itself: a folder is not there, say
        code = IO_ERROR if isinstance(error.cause, OSError) else INTERNAL
        last = str(error.cause).strip().splitlines()[-1:]
        return Ended(code, f"{type(error.cause).__name__}: {''.join(last)}")
    except ray.exceptions.RayError as error:
        return Ended(-signal.SIGKILL, f"its worker died ({type(error).__name__})")


def _stop(ray: Any, tasks: list[Any], grace: float) -> None:
    """Cancel the tasks, and give their commands the time to commit."""
    for task in tasks:
        ray.cancel(task)
    ray.wait(tasks, num_returns=len(tasks), timeout=grace + STOP_SECONDS)


def _rows(output: Path) -> str:
    report = read_report(output)
    return f"{report.rows:,} rows" + (f" ({report.rows_resumed:,} done before)" if report.rows_resumed else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _say(line: str) -> None:
    print(f"batchinfer: {line}", file=sys.stderr, flush=True)
