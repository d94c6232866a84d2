"""A job as an array of Slurm: each task runs a shard, and one more job merges them when all are done.

Slurm may end a task at any time, for its time limit or for a job that goes before it. The task's script then makes
batchinfer commit what is finished, and has the same task started again, where it goes on.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.flag_values import seconds_of
from batchinfer.jobs.spec import JobSpec

SIGNAL_SECONDS = 120  # before its time limit a task is told to stop
EARLY_SECONDS = 60  # Slurm may tell it so much earlier still

HEAD = """\
#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
"""

# Of the script of a shard, before the command that runs it in the background, and behind it.
HAND_ON = """
# USR1 comes before the time limit and at a preemption, TERM when Slurm ends the task; one of them is enough to say.
trap 'kill -TERM $! && trap : USR1 TERM' USR1 TERM
"""
UNTIL_IT_ENDS = """\
run=$!
while kill -0 "$run" 2>/dev/null; do wait "$run"; done # a signal ends `wait`, not batchinfer
wait "$run"
code=$?

# 75: rows are left; 143: it was told to stop before it listened. A task that Slurm is ending, since it was cancelled
# or is about to be started again, is not running any more.
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [[ $code == 75 || $code == 143 ]] && [[ $(squeue --noheader --format=%T --jobs="$task") == RUNNING ]]; then
    scontrol requeue "$task" && { sleep 600 & wait; } # until Slurm ends this script
fi
exit "$code"
"""


@dataclass(frozen=True)
class Submission:
    """`count` tasks of `command run --shard I/count arguments`, and a job of `command merge` after them.

    Paths in `arguments` are relative to `folder`, which it is submitted from; `output` is absolute.
    `options` are `sbatch`'s for both jobs, `shard_options` for the array alone.
    """

    command: Sequence[str]
    arguments: Sequence[str]
    folder: Path
    output: Path
    count: int
    options: Sequence[str] = ()
    shard_options: Sequence[str] = ()

    @property
    def place(self) -> Path:
        """OUT.slurm: the scripts, and a log a shard."""
        return self.output.with_suffix(".slurm")

    @property
    def shards_script(self) -> Path:
        return self.place / "shards.sh"

    @property
    def merge_script(self) -> Path:
        return self.place / "merge.sh"

    def scripts(self) -> dict[Path, str]:
        """The text of each script."""
        enter = f"\ncd {shlex.quote(str(self.folder))} || exit\n"
        program, output = shlex.join(self.command), self.output
        run = f'{program} run --shard "$SLURM_ARRAY_TASK_ID/{self.count}" {shlex.join(self.arguments)} &\n'
        before, after = f"{output.with_suffix('')}-", f"-of-{self.count}{output.suffix}"
        outputs = f"{shlex.quote(before)}{{0..{self.count - 1}}}{shlex.quote(after)}"
        merge = f"exec {program} merge {outputs} -o {shlex.quote(str(output))} --overwrite\n"
        signal = f"#SBATCH --signal=B:USR1@{SIGNAL_SECONDS}\n"
        about_run = "# A task of the array runs a shard. One that is started again goes on where it ended.\n"
        about_merge = "# The outputs of all shards, put together; what was put together before is replaced.\n"
        return {
            self.shards_script: HEAD + signal + about_run + enter + HAND_ON + run + UNTIL_IT_ENDS,
            self.merge_script: HEAD + about_merge + enter + merge,
        }

    def shards_command(self) -> list[str]:
        """What submits the array."""
        array = f"--array=0-{self.count - 1}"
        return [*self._sbatch("shard-%a.log"), array, *self.shard_options, str(self.shards_script)]

    def merge_command(self, array: str) -> list[str]:
        """What submits the merge, after the array of that id. It verifies every shard itself, so that nothing hangs on
        the exit codes that Slurm keeps: of a task that was started again that may be the first one's."""
        return [*self._sbatch("merge.log"), f"--dependency=afterany:{array}", str(self.merge_script)]

    def _sbatch(self, log: str) -> list[str]:
        folder = str(self.place).replace("%", "%%")  # in file names % is Slurm's own sign
        name = f"--job-name={self.output.stem}"
        return ["sbatch", "--parsable", name, f"--output={folder}/{log}", *self.options]


def check_job(spec: JobSpec, time: str | None) -> None:
    """Raises `UsageError` for what `batchinfer run` takes and a shard under Slurm cannot have."""
    for given, flag, remedy in (
        (spec.shard is not None, "--shard", "the shards are made by --array"),
        (spec.incremental, "--incremental", "what is new is one job, and small: run it as one"),
        (spec.time_limit is not None, "--time-limit", f"a task is told to stop {SIGNAL_SECONDS} s before --time"),
        (spec.overwrite, "--overwrite", "a task that is started again must go on: remove the earlier files instead"),
        (not spec.resume, "--no-resume", "a task that is started again must go on: choose another output instead"),
    ):
        if given:
            raise UsageError(f"{flag} cannot be given here, for {remedy}")
    if spec.grace > SIGNAL_SECONDS:
        raise UsageError(f"--grace is {spec.grace:g}; it must be at most {SIGNAL_SECONDS}, when a task's time is up")
    needed = SIGNAL_SECONDS + EARLY_SECONDS
    if time is not None and seconds_of("--time", time) < needed:
        raise UsageError(
            f"--time is {time!r}; it must be {needed // 60} minutes or more, since a task may be told to stop so long "
            "before its end"
        )


def submit(submission: Submission) -> tuple[str, str]:
    """Write the scripts and submit them: the ids of the array and of the merge.

    Raises `UsageError` for more shards than the site takes, and `Refused` where there is no Slurm, it refuses, or the
    output is somebody else's.
    """
    if submission.output.exists() and not submission.merge_script.exists():
        raise Refused(
            f"output {submission.output} exists and no submission made it; choose another one or move it away"
        )
    _check_size(submission.count)
    submission.place.mkdir(parents=True, exist_ok=True)
    for path, text in submission.scripts().items():
        path.write_text(text, "utf-8")
    array = _sbatch(submission.shards_command())
    try:
        return array, _sbatch(submission.merge_command(array))
    except Refused as error:
        raise Refused(
            f"array {array} is submitted, its merge is not: {error}; stop it with 'scancel {array}', or merge yourself "
            f"with 'bash {shlex.quote(str(submission.merge_script))}'"
        ) from error


def dry_run(submission: Submission) -> str:
    """What `submit` would write and run."""
    files = [f"# {path}\n{text}" for path, text in submission.scripts().items()]
    commands = [submission.shards_command(), submission.merge_command("ARRAY_JOB_ID")]
    return "\n".join([*files, "# submitted by", *map(shlex.join, commands)])


def _check_size(count: int) -> None:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm(["scontrol", "show", "config"]), re.MULTILINE)
    if found is not None and count > int(found[1]):
        raise UsageError(
            f"--array is {count}; this site takes at most {found[1]} (its MaxArraySize): give fewer shards"
        )


def _sbatch(command: list[str]) -> str:
    """The id of the job: what is printed is ID, or ID;CLUSTER."""
    return _slurm(command).strip().split(";")[0]


def _slurm(command: list[str]) -> str:
    """What it prints. Raises `Refused` with its message."""
    if shutil.which(command[0]) is None:
        raise Refused(
            f"{command[0]} is not here: submit on a machine of a Slurm cluster; --dry-run shows what would be submitted"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{command[0]} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
