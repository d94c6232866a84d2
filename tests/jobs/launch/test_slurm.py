"""Jobs as arrays of Slurm: what is submitted, and what the scripts do, under bash with stand-ins for Slurm's commands.

`test_slurm_cluster.py` has a real Slurm.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchinfer import __version__
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.launch import slurm
from batchinfer.jobs.launch.slurm import Submission
from batchinfer.jobs.spec import sharded

ECHO = [sys.executable, "-c", "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))"]
RUN = ["--cpu-path", "reference", "in.parquet", "-o", "out.parquet", "--model", "m"]


def submission(folder: Path, *command: str, count: int = 4, arguments: list[str] = RUN) -> Submission:
    return Submission(command or ECHO, arguments, folder, folder / "out.parquet", count)


def stand_in(folder: Path, name: str, script: str) -> None:
    """A command of that name, which notes its arguments, a line a call, in a file beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >>{shlex.quote(str(folder / name))}.calls\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Slurm's commands, first in PATH; jobs are numbered from 7."""
    folder = tmp_path / "site"
    stand_in(folder, "sbatch", f'echo "$(($(wc -l <{folder}/sbatch.calls) + 6));cluster"')
    stand_in(folder, "scontrol", '[[ $1 != show ]] || echo "MaxArraySize            = 1001"')
    stand_in(folder, "squeue", "echo RUNNING")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is submitted from."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def command_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `batchinfer slurm submit`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchinfer", "slurm", "submit", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


AWKWARD = """it's "a" $HOME `b` {x} *\\ %a #"""


def test_every_argument_arrives_as_it_was_given(tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    folder.mkdir()
    arguments = ["in 1.parquet", "--prompt-template", f"{AWKWARD}\n{{text}}", "", "-o", "o.parquet", "--", "-x"]
    made = Submission(ECHO, arguments, folder, folder / "a b.c.parquet", 3)
    heard = []
    for script in made.scripts().values():
        done = subprocess.run(
            ["bash"], input=script, env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr
        heard.append(json.loads(done.stdout))
    outputs = [str(sharded(made.output, index, 3)) for index in range(3)]
    assert heard == [
        [str(folder), ["run", "--shard", "2/3", *arguments]],
        [str(folder), ["merge", *outputs, "-o", str(made.output), "--overwrite"]],
    ]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_merge_gets_the_output_of_each_shard(tmp_path: Path, count: int) -> None:
    made = submission(tmp_path, count=count)
    done = subprocess.run(["bash", "-c", made.scripts()[made.merge_script]], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[1][1:-3] == [str(sharded(made.output, index, count)) for index in range(count)]


def test_the_script_asks_slurm_for_what_it_needs(tmp_path: Path) -> None:
    lines = submission(tmp_path).scripts()[tmp_path / "out.slurm" / "shards.sh"].splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[1:4] == ["#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120"]


# A run that notes each TERM and ends with CODE: at the first one, or at once where it is given a code alone.
STOPPED = "trap 'echo >>told; [[ -e more ]] || exit {code}' TERM; echo $$ >ready; while :; do sleep 0.02; done"


def start(folder: Path, run: str) -> subprocess.Popen[str]:
    """The array's script as task 3 of array 7, with a stand-in for batchinfer, in a process group of its own."""
    made = submission(folder, "bash", "-c", run)
    script = folder / "script.sh"
    script.write_text(made.scripts()[made.shards_script])
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7"}
    return subprocess.Popen(
        ["bash", script], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stop(folder: Path, process: subprocess.Popen[str], *numbers: signal.Signals) -> int:
    """Its exit code, after these signals to the script alone."""
    wait_for(folder / "ready")
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    return process.wait(timeout=60)


@pytest.fixture
def requeues(site: Path) -> Path:
    """A site whose requeue ends the script, as Slurm does, when it has its answer."""
    stand_in(site, "scontrol", "(sleep 0.3; kill -TERM 0) &")
    return site


@pytest.mark.parametrize("code", [0, 2, 65, 70, 74])
def test_what_is_not_to_be_continued_ends_with_its_own_code(here: Path, site: Path, code: int) -> None:
    assert start(here, f"exit {code}").wait(timeout=60) == code
    assert not calls(site, "scontrol")


def test_a_task_that_is_told_to_stop_is_started_again(here: Path, requeues: Path) -> None:
    assert stop(here, start(here, STOPPED.format(code=75)), signal.SIGUSR1) == 75
    assert (here / "told").read_text() == "\n", "batchinfer's second signal would end it at once"
    assert calls(requeues, "squeue") == ["--noheader --format=%T --jobs=7_3"]
    # Never the job id alone: of one of the tasks it is the id of the whole array, whose tasks all would start again.
    assert calls(requeues, "scontrol") == ["requeue 7_3"]


def test_of_several_signals_one_is_handed_on(here: Path, requeues: Path) -> None:
    (here / "more").touch()
    process = start(here, STOPPED.format(code=75))
    wait_for(here / "ready")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    (here / "more").unlink()
    assert (here / "told").read_text() == "\n"
    os.kill(int((here / "ready").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_batchinfer_may_be_stopped_before_it_listens(here: Path, requeues: Path) -> None:
    assert stop(here, start(here, "echo >ready; exec sleep 60"), signal.SIGUSR1) == 143
    assert calls(requeues, "scontrol") == ["requeue 7_3"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_task_that_slurm_ends_is_not_started_again(here: Path, requeues: Path, state: str) -> None:
    stand_in(requeues, "squeue", f"echo {state}")
    assert stop(here, start(here, STOPPED.format(code=75)), signal.SIGTERM) == 75
    assert not calls(requeues, "scontrol")


def test_where_it_cannot_be_started_again_the_code_says_so(here: Path, site: Path) -> None:
    stand_in(site, "scontrol", "echo 'Requeue is disabled' >&2; exit 1")
    process = start(here, STOPPED.format(code=75))
    assert stop(here, process, signal.SIGUSR1) == 75
    assert process.stderr is not None and "Requeue is disabled" in process.stderr.read()


def test_the_code_is_batchinfers_own_however_fast_it_ends(here: Path, site: Path) -> None:
    """`wait` ends with 138 for the signal; it must not be taken for the code."""
    stand_in(site, "squeue", "echo COMPLETING")
    for _ in range(20):
        process = start(here, "trap 'exit 74' TERM; echo >ready; while :; do :; done")
        assert stop(here, process, signal.SIGUSR1) == 74
        (here / "ready").unlink()


def test_it_submits_the_array_and_the_merge(here: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--array",
        "16",
        "--time",
        "4:00:00",
        "--partition",
        "gpu",
        "--gres",
        "gpu:1",
        "--sbatch",
        "--account=me",
    ]
    code, out, err = command_line(capsys, *options, "--", *RUN)
    place = here / "out.slurm"
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"array 7: 16 shards; job 8 merges them into {here}/out.parquet when all are done",
        f"logs: {place}/shard-*.log and merge.log",
    ]
    both = "--time=4:00:00 --partition=gpu --account=me"
    assert calls(site, "sbatch") == [
        f"--parsable --job-name=out --output={place}/shard-%a.log {both} --array=0-15 --gres=gpu:1 {place}/shards.sh",
        f"--parsable --job-name=out --output={place}/merge.log {both} --dependency=afterany:7 {place}/merge.sh",
    ]
    program = shlex.join([sys.executable, "-P", "-m", "batchinfer"])
    assert f'{program} run --shard "$SLURM_ARRAY_TASK_ID/16" {shlex.join(RUN)} &\n' in (place / "shards.sh").read_text()
    assert f"exec {program} merge {here}/out-{{0..15}}-of-16.parquet" in (place / "merge.sh").read_text()


def test_that_program_starts_wherever_it_is_submitted(here: Path) -> None:
    (here / "batchinfer.py").write_text("raise SystemExit('a stranger')")
    program = [sys.executable, "-P", "-m", "batchinfer", "--version"]
    assert subprocess.check_output(program, text=True) == f"batchinfer {__version__}\n"


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = command_line(capsys, "--array", "2", "--dry-run", "--", *RUN)
    assert (code, err, list(here.iterdir())) == (0, "", [])
    made = submission(here, sys.executable, "-P", "-m", "batchinfer", count=2)
    for path, text in made.scripts().items():
        assert f"# {path}\n{text}" in out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("sbatch ")]
    assert commands == [made.shards_command(), made.merge_command("ARRAY_JOB_ID")]
    code, out, err = command_line(capsys, "--array", "2", "--", *RUN)
    assert (code, out, list(here.iterdir())) == (65, "", [])
    assert "scontrol is not installed: submit on a machine of a Slurm cluster; --dry-run shows" in err


@pytest.mark.parametrize(
    ("options", "run", "message"),
    [
        ([], RUN, "Missing option '--array'"),
        (["--array", "0"], RUN, "--array is 0; it must be 1 or more"),
        (
            ["--array", "1002"],
            RUN,
            "--array is 1002; this site takes at most 1001 (Slurm's MaxArraySize): give fewer shards",
        ),
        (["--array", "2", "--time", "soon"], RUN, "--time is 'soon'"),
        (["--array", "2", "--time", "2:59"], RUN, "--time is '2:59'; it must be 3 minutes or more"),
        (["--array", "2", "--sbatch", "me"], RUN, "--sbatch is 'me'; it must be an option of sbatch"),
        (
            ["--array", "2"],
            [*RUN, "--shard", "0/2"],
            "--shard cannot be given here: --array makes the shards",
        ),
        (
            ["--array", "2"],
            [*RUN, "--time-limit", "5"],
            "--time-limit cannot be given here: a task is told to stop",
        ),
        (["--array", "2"], [*RUN, "--overwrite"], "--overwrite cannot be given here"),
        (["--array", "2"], [*RUN, "--no-resume"], "--no-resume cannot be given here"),
        (["--array", "2"], [*RUN, "--grace", "121"], "--grace is 121; it must be at most 120"),
        (["--array", "2"], RUN[:-2], "--model is missing"),
        (["--array", "2"], [*RUN, "--max-tokens", "0"], "--max-tokens is 0"),
        (["--array", "2"], ["--help"], "ask for help and do not describe a job"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    here: Path, site: Path, capsys: pytest.CaptureFixture[str], options: list[str], run: list[str], message: str
) -> None:
    code, _, err = command_line(capsys, *options, "--", *run)
    assert code == 2 and message in err and err.startswith("batchinfer: error: ") and err.count("\n") == 1
    assert not calls(site, "sbatch") and not list(here.iterdir())


def test_as_many_shards_as_the_site_takes(here: Path, site: Path) -> None:
    assert slurm.submit(submission(here, count=1001)) == ("7", "8")
    with pytest.raises(UsageError):
        slurm.submit(submission(here, count=1002))


def test_a_job_file_is_asked_too(here: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "job.toml").write_text('input = "in.parquet"\noutput = "a/out.parquet"\nmodel = "m"\n')
    code, out, _ = command_line(capsys, "--array", "2", "--", "--config", "job.toml")
    assert code == 0 and f"logs: {here}/a/out.slurm/" in out
    with (here / "job.toml").open("a") as file:
        file.write('shard = "0/2"\n')
    assert command_line(capsys, "--array", "2", "--", "--config", "job.toml")[0] == 2


def test_what_sbatch_refuses_is_said(here: Path, site: Path) -> None:
    stand_in(
        site, "sbatch", '[[ "$*" != *--dependency* ]] && echo 7 || { echo "sbatch: error: no such QOS" >&2; exit 1; }'
    )
    with pytest.raises(
        Refused, match=r"array 7 was submitted, but its merge was not: sbatch failed: .*no such QOS; stop the array"
    ):
        slurm.submit(submission(here))
    stand_in(site, "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    with pytest.raises(Refused, match=r"^sbatch failed: sbatch: error: invalid partition$"):
        slurm.submit(submission(here))


def test_only_its_own_output_is_replaced(here: Path, site: Path) -> None:
    (here / "out.parquet").touch()
    with pytest.raises(Refused, match=r"out\.parquet exists and no submission made it"):
        slurm.submit(submission(here))
    (here / "out.parquet").unlink()
    slurm.submit(submission(here))
    (here / "out.parquet").touch()
    assert slurm.submit(submission(here)) == ("9", "10")


def test_logs_lie_in_folders_of_any_name(here: Path) -> None:
    made = Submission(ECHO, RUN, here, here / "50%a" / "out.parquet", 2)
    assert f"--output={here}/50%%a/out.slurm/shard-%a.log" in made.shards_command()
