"""Shards on a Ray cluster: what is refused, what is tried again, and a worker killed while its shard runs."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import typer
from stub_jobs import ENGINES, SCRIPT, expected, prompts, write

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.main import app
from batchinfer.jobs.launch.ray_tasks import Cluster, Ended, Share, run_shard
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.verify import verify

N = 2000
LIMIT = 120.0  # seconds, against hanging

WITHOUT_RAY = importlib.util.find_spec("ray") is None


def needs_ray(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(WITHOUT_RAY, reason="Ray is not installed: run pip install '.[ray]'")
    return pytest.mark.long(pytest.mark.ray(skip(test)))


def call(*arguments: object) -> int | None:
    """The exit code of the command in this process, had it got as far as its end; else its exception."""
    return app(["ray", *map(str, arguments)], prog_name="batchinfer", standalone_mode=False)


# What is refused before anything begins.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "in.parquet", "-o", "o.parquet", "--model", "m"], "Missing parameter: shards"),
        (["--shards", "0", "--", "in.parquet", "-o", "o.parquet", "--model", "m"], "--shards is 0; it must be 1"),
        (["--shards", "2", "--", "in.parquet", "--model", "m"], "--output is missing"),
        (["--shards", "2", "--", "in.parquet", "-o", "o.parquet", "--model", "m", "--top-p", "2"], "--top-p is 2.0"),
        (["--shards", "2", "--", "in.parquet", "-o", "o.parquet", "--no-such-flag"], "--no-such-flag"),
        (
            ["--shards", "2", "--", "in", "-o", "o.parquet", "--model", "m", "--shard", "0/2"],
            "--shard out .* --shards N",
        ),
        (["--shards", "2", "--", "in", "-o", "o.parquet", "--model", "m", "--overwrite"], "leave --overwrite out"),
        (["--shards", "2", "--", "in", "-o", "o.parquet", "--model", "m", "--no-resume"], "leave --no-resume out"),
        (["--shards", "2", "--", "in", "-o", "o.parquet", "--model", "m", "--time-limit", "5"], "leave --time-limit"),
    ],
)
def test_arguments_are_refused_as_run_would(arguments: list[str], message: str) -> None:
    with pytest.raises((UsageError, typer.TyperException), match=message):
        call(*arguments)


def test_a_job_file_is_refused_for_its_shard_too(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('input = "in.parquet"\noutput = "o.parquet"\nmodel = "m"\nshard = "0/2"\n')
    with pytest.raises(UsageError, match="leave --shard out"):
        call("--shards", 2, "--", "--config", tmp_path / "job.toml")


def test_an_output_that_is_there_is_refused_before_the_shards_run(tmp_path: Path) -> None:
    (tmp_path / "o.parquet").touch()
    with pytest.raises(Refused, match=r"o\.parquet exists"):
        call("--shards", 2, "--", tmp_path / "in.parquet", "-o", tmp_path / "o.parquet", "--model", "m")


def test_without_ray_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"pip install '\.\[ray\]'"):
        call("--shards", 2, "--", tmp_path / "in.parquet", "-o", tmp_path / "o.parquet", "--model", "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"address": "somewhere"}, "--address is 'somewhere'; give the head's HOST:PORT"),
        ({"address": "ray://head:10001"}, "--address is 'ray://head:10001'"),
        ({"address": "head:65536"}, "--address is 'head:65536'"),
        ({"gpus_per_shard": 1, "cpus_per_shard": 1}, "one of --gpus-per-shard and --cpus-per-shard"),
        ({"gpus_per_shard": 0}, "--gpus-per-shard is 0; it must be 1 or more"),
        ({"cpus_per_shard": 0}, "--cpus-per-shard is 0; it must be 1 or more"),
        ({"max_retries": -1}, "--max-retries is -1; it must be 0 or more"),
    ],
)
def test_bounds_of_a_cluster(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cluster(**fields)


CPU_NODES = [{"CPU": 16.0}, {"CPU": 8.0}, {"memory": 1.0}]
GPU_NODES = [{"CPU": 4.0}, {"CPU": 32.0, "GPU": 8.0}]


@pytest.mark.parametrize(
    ("nodes", "device", "fields", "share"),
    [
        (CPU_NODES, "auto", {}, Share("cpu", 8)),
        (CPU_NODES, "cpu", {"cpus_per_shard": 3}, Share("cpu", 3)),
        (GPU_NODES, "auto", {}, Share("cuda", 1, 1)),
        (GPU_NODES, "cuda", {"gpus_per_shard": 2}, Share("cuda", 1, 2)),
        (GPU_NODES, "cpu", {}, Share("cpu", 4)),
        (GPU_NODES, "auto", {"cpus_per_shard": 32}, Share("cpu", 32)),
    ],
)
def test_what_a_shard_takes(nodes: Any, device: str, fields: dict[str, int], share: Share) -> None:
    assert Cluster(**fields).share(device, nodes) == share


@pytest.mark.parametrize(
    ("nodes", "device", "fields", "message"),
    [
        (CPU_NODES, "cuda", {}, "takes 1 GPU, and no node of the cluster has more than 0"),
        (CPU_NODES, "auto", {"gpus_per_shard": 1}, "takes 1 GPU, and"),
        (GPU_NODES, "auto", {"gpus_per_shard": 9}, "takes 9 GPUs, and no node of the cluster has more than 8"),
        (GPU_NODES, "cpu", {"cpus_per_shard": 33}, "takes 33 CPUs, and no node of the cluster has more than 32"),
        ([], "auto", {}, "takes 1 CPU, and no node of the cluster has more than 0"),
        (GPU_NODES, "cuda", {"cpus_per_shard": 1}, "--device is cuda"),
        (GPU_NODES, "cpu", {"gpus_per_shard": 1}, "--device is cpu"),
    ],
)
def test_what_no_node_has_is_refused(nodes: Any, device: str, fields: dict[str, int], message: str) -> None:
    with pytest.raises((Refused, UsageError), match=message):
        Cluster(**fields).share(device, nodes)


# A shard's command, without Ray.


def command(code: str) -> list[str]:
    return ["-c", textwrap.dedent(code)]


@pytest.mark.parametrize("code", [1, 2, 65, 70, 74])
def test_what_ends_a_shard_for_good(tmp_path: Path, code: int) -> None:
    said = f"import sys; print('a line'); print('batchinfer: error: too bad', file=sys.stderr); sys.exit({code})"
    end = run_shard(command(said), tmp_path, Path("new/o.parquet"))
    assert end == Ended(code, "too bad")
    assert not end.unfinished
    assert sorted((tmp_path / "new" / "o.log").read_text().splitlines()) == ["a line", "batchinfer: error: too bad"]


@pytest.mark.parametrize(
    ("ending", "end"),
    [
        ("exit(75)", Ended(75, "its log is empty")),
        ("print('batchinfer: error: stopped after 3 of 5 rows'); exit(75)", Ended(75, "stopped after 3 of 5 rows")),
        ("import os; os.kill(os.getpid(), 9)", Ended(-9, "it was killed by SIGKILL")),
    ],
)
def test_what_runs_again(tmp_path: Path, ending: str, end: Ended) -> None:
    assert run_shard(command(ending), tmp_path, Path("o.parquet")) == end
    assert end.unfinished


def test_a_shard_runs_where_the_command_was_given(tmp_path: Path) -> None:
    end = run_shard(command("import os; print(os.getcwd()); exit(2)"), tmp_path, Path("o.parquet"))
    assert end.said == str(tmp_path)


# With Ray: started by the command, and ended with it.

DRIVER = """
import sys
from functools import partial
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.launch import ray_tasks

if __name__ == "__main__":
    program = sys.argv[1:sys.argv.index("ray")]
    del sys.argv[1:1 + len(program)]
    ray_tasks.run_shards = partial(ray_tasks.run_shards, program=program)
    main()
"""


class Job:
    """`batchinfer ray` over two shards, each of which runs `program`; by default a job with a slow stub engine."""

    def __init__(self, folder: Path, model: Path, *program: object, retries: int = 3) -> None:
        self.output = folder / "out.parquet"
        self.shards = [sharded(self.output, i, 2) for i in range(2)]
        write(folder / "in.parquet", prompt=prompts(N))
        (folder / "driver.py").write_text(DRIVER)
        (folder / "main.py").write_text(SCRIPT)
        (folder / "engines_of_the_test.py").write_text(ENGINES)
        job = ["in.parquet", "-o", "out.parquet", "--model", model, "--commit-rows", "20", "--max-tokens", "8"]
        flags = ["--shards", "2", "--address", "local", "--cpus-per-shard", "1", "--max-retries", retries]
        parts = [sys.executable, folder / "driver.py", *(program or (folder / "main.py", folder, "run"))]
        self._process = subprocess.Popen(
            [*map(str, [*parts, "ray", *flags, "--", *job])],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # Ray's processes end with it
        self._process.communicate()

    def wait(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        out, err = self._process.communicate(timeout=LIMIT)
        return self._process.returncode, out, err

    def interrupt(self) -> None:
        """As a terminal does it: the signal goes to all of the command's group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def command_of(self, shard: int) -> psutil.Process:
        """The process of that shard's command."""
        (found,) = [
            process
            for process in psutil.Process(self._process.pid).children(recursive=True)
            if f"{shard}/2" in process.cmdline() and "--shard" in process.cmdline()
        ]
        return found

    def parts(self, shard: int) -> int:
        return len(list((self.shards[shard].with_suffix(".run") / "parts").glob("*")))

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not happened():
            assert self._process.poll() is None, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.02)


@needs_ray
def test_a_shard_whose_worker_is_killed_goes_on_where_it_was(tmp_path: Path, model: Path) -> None:
    with Job(tmp_path, model) as job:
        job.until(lambda: job.parts(1) >= 2)
        killed = job.command_of(1)
        killed.parent().kill()
        code, out, err = job.wait()
    assert code == 0, err
    assert not killed.is_running()
    assert out == f"out.parquet: {N:,} rows of 2 shards\n"
    for shard in job.shards:
        verify(shard)
    reports = [read_report(shard) for shard in job.shards]
    assert [report.rows for report in reports] == [N // 2, N // 2]
    assert reports[0].rows_resumed == 0
    assert 40 <= reports[1].rows_resumed < N // 2
    assert "batchinfer: shard 0 of 2 is done: 1,000 rows\n" in err
    assert "batchinfer: shard 1 of 2 runs again (retry 1 of at most 3): its worker died" in err
    assert f"batchinfer: shard 1 of 2 is done: 1,000 rows ({reports[1].rows_resumed} done before)\n" in err
    table = pq.read_table(job.output)
    assert table["prompt"].to_pylist() == prompts(N)
    assert table["generated_text"].to_pylist() == expected(model, prompts(N))


@needs_ray
def test_an_interruption_commits_and_the_same_command_goes_on(tmp_path: Path, model: Path) -> None:
    with Job(tmp_path, model) as job:
        job.until(lambda: job.parts(0) >= 2 and job.parts(1) >= 2)
        commands = [job.command_of(shard) for shard in range(2)]
        job.interrupt()
        code, _, err = job.wait()
    assert code == 75
    assert err.endswith("batchinfer: error: stopped when 0 of 2 shards had ended; give the same command to continue\n")
    assert not any(command.is_running() for command in commands)
    for shard in job.shards:
        assert "batchinfer: error: stopped after" in shard.with_suffix(".log").read_text()
    with Job(tmp_path, model) as again:
        code, _, err = again.wait()
    assert code == 0, err
    assert err.count("done before)") == 2
    assert pq.read_table(job.output)["generated_text"].to_pylist() == expected(model, prompts(N))


ENDS = """
import sys

shard = sys.argv[sys.argv.index("--shard") + 1]
print("began")
sys.exit(f"batchinfer: error: {shard} is bad") if shard == "0/2" else sys.exit(75)
"""


@needs_ray
def test_failures_are_told_and_what_was_stopped_runs_again(tmp_path: Path, model: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    with Job(tmp_path, model, tmp_path / "ends.py", retries=2) as job:
        code, out, err = job.wait()
    assert (code, out) == (70, "")
    assert "batchinfer: shard 0 of 2 failed: exit code 1: 0/2 is bad\n" in err
    assert "batchinfer: shard 1 of 2 runs again (retry 2 of at most 2): exit code 75: began\n" in err
    assert "batchinfer: shard 1 of 2 failed: exit code 75: began\n" in err
    assert "batchinfer: error: 2 of 2 shards failed, shard 0 first: exit code 1: 0/2 is bad; nothing was merged" in err
    assert [shard.with_suffix(".log").read_text().count("began") for shard in job.shards] == [1, 3]
    assert not job.output.exists()
