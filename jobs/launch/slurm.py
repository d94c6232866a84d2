"""Running a job as a Slurm array: each task runs a shard, and another Slurm job merges the shards when all are done.

Slurm may end a task at any time, for its time limit or for a job of higher priority. Then the task's script has
batchinfer commit its finished rows, and has Slurm start the task again, which continues from there.
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
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec

SIGNAL_SECONDS = 120  # time before its limit at which a task is told to stop
EARLY_SECONDS = 60  # Slurm may send that signal up to this much earlier

HEAD = """\
#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
"""

# Lines of a shard's script before and after the command that runs in the background.
HAND_ON = """
# Slurm sends USR1 before the time limit and at a preemption, and TERM when it ends the task. Pass on the first only.
trap 'kill -TERM $! && trap : USR1 TERM' USR1 TERM
"""
UNTIL_IT_ENDS = """\
run=$!
while kill -0 "$run" 2>/dev/null; do wait "$run"; done # a signal ends `wait`, but not batchinfer
wait "$run"
code=$?

# 75: rows are left; 143: batchinfer was stopped before it handled signals. A task that Slurm is ending, since it was
# cancelled or is about to be started again, is not in the state RUNNING any more.
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [[ $code == 75 || $code == 143 ]] && [[ $(squeue --noheader --format=%T --jobs="$task") == RUNNING ]]; then
    scontrol requeue "$task" && { sleep 600 & wait; } # until Slurm ends this script
fi
exit "$code"
"""


@dataclass(frozen=True)
class Submission:
    """An array of `count` tasks `command run --shard I/count arguments`, and a job `command merge` after them.

    Paths in `arguments` are relative to `folder`, the folder of the submission; `output` is absolute. `options` are
    sbatch's options for both jobs, and `shard_options` those for the array only.
    """

    command: Sequence[str]
    arguments: Sequence[str]
    folder: Path
    output: Path
    count: int
    options: Sequence[str] = ()
    shard_options: Sequence[str] = ()

    @property
    def scripts_folder(self) -> Path:
        """The folder OUT.slurm, with the scripts and a log for each shard."""
        return self.output.with_suffix(".slurm")

    @property
    def shards_script(self) -> Path:
        return self.scripts_folder / "shards.sh"

    @property
    def merge_script(self) -> Path:
        return self.scripts_folder / "merge.sh"

    def scripts(self) -> dict[Path, str]:
        """Return the text of each script, by path."""
        enter = f"\ncd {shlex.quote(str(self.folder))} || exit\n"
        program, output = shlex.join(self.command), self.output
        run = f'{program} run --shard "$SLURM_ARRAY_TASK_ID/{self.count}" {shlex.join(self.arguments)} &\n'
        before, after = f"{output.with_suffix('')}-", f"-of-{self.count}{output.suffix}"
        outputs = f"{shlex.quote(before)}{{0..{self.count - 1}}}{shlex.quote(after)}"
        merge = f"exec {program} merge {outputs} -o {shlex.quote(str(output))} --overwrite\n"
        signal = f"#SBATCH --signal=B:USR1@{SIGNAL_SECONDS}\n"
        about_run = "# Each task of the array runs a shard. A task that is started again continues where it stopped.\n"
        about_merge = "# Merge the outputs of all shards. An earlier merged output is replaced.\n"
        return {
            self.shards_script: HEAD + signal + about_run + enter + HAND_ON + run + UNTIL_IT_ENDS,
            self.merge_script: HEAD + about_merge + enter + merge,
        }

    def shards_command(self) -> list[str]:
        """Return the command that submits the array."""
        array = f"--array=0-{self.count - 1}"
        return [*self._sbatch("shard-%a.log"), array, *self.shard_options, str(self.shards_script)]

    def merge_command(self, array: str) -> list[str]:
        """Return the command that submits the merge, to run after the array with this id.

        The merge verifies every shard itself. It does not depend on the tasks' exit codes, since for a task that was
        started again Slurm may keep the first exit code.
        """
        return [*self._sbatch("merge.log"), f"--dependency=afterany:{array}", str(self.merge_script)]

    def _sbatch(self, log: str) -> list[str]:
        folder = str(self.scripts_folder).replace("%", "%%")  # % has a special meaning in Slurm's file names
        name = f"--job-name={self.output.stem}"
        return ["sbatch", "--parsable", name, f"--output={folder}/{log}", *self.options]


def check_job(spec: JobSpec, time: str | None) -> None:
    """Raise `UsageError` for settings that `batchinfer run` takes but a shard under Slurm cannot have."""
    for given, flag, remedy in (
        (spec.shard is not None, "--shard", "--array makes the shards"),
        (spec.incremental, "--incremental", "new rows are one small job: run it without shards"),
        (spec.time_limit is not None, "--time-limit", f"a task is told to stop {SIGNAL_SECONDS} s before --time"),
        (spec.overwrite, "--overwrite", "a task that is started again must go on: remove the earlier files instead"),
        (not spec.resume, "--no-resume", "a task that is started again must go on: choose another output instead"),
    ):
        if given:
            raise UsageError(f"{flag} cannot be given here: {remedy}")
    if spec.grace > SIGNAL_SECONDS:
        raise UsageError(
            f"--grace is {spec.grace:g}; it must be at most {SIGNAL_SECONDS}, the time that a task has to end"
        )
    needed = SIGNAL_SECONDS + EARLY_SECONDS
    if time is not None and seconds_of("--time", time) < needed:
        raise UsageError(
            f"--time is {time!r}; it must be {needed // 60} minutes or more, since a task may be told to stop that "
            "long before its end"
        )


def submit(submission: Submission) -> tuple[str, str]:
    """Write the scripts and submit them. Returns the ids of the array and of the merge.

    Raises `UsageError` for more shards than the site allows, and `Refused` if Slurm is missing or refuses, or if an
    output exists that no submission made.
    """
    if RunFolder(submission.output).begun and not submission.merge_script.exists():
        raise Refused(
            f"output {submission.output} exists and no submission made it; choose another one or move it away"
        )
    _check_size(submission.count)
    submission.scripts_folder.mkdir(parents=True, exist_ok=True)
    for path, text in submission.scripts().items():
        path.write_text(text, "utf-8")
    array = _sbatch(submission.shards_command())
    try:
        return array, _sbatch(submission.merge_command(array))
    except Refused as error:
        raise Refused(
            f"array {array} was submitted, but its merge was not: {error}; stop the array with 'scancel {array}', or "
            f"merge when it has ended with 'bash {shlex.quote(str(submission.merge_script))}'"
        ) from error


def submitted(output: Path) -> int | None:
    """Return the number of shards that were submitted last for an output; None if none were, or nobody can tell."""
    try:
        script = output.with_suffix(".slurm").joinpath("shards.sh").read_text("utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r'--shard "\$SLURM_ARRAY_TASK_ID/(\d+)"', script)
    return None if found is None else int(found[1])


def dry_run(submission: Submission) -> str:
    """Return the scripts and commands that `submit` would write and run, as text."""
    files = [f"# {path}\n{text}" for path, text in submission.scripts().items()]
    commands = [submission.shards_command(), submission.merge_command("ARRAY_JOB_ID")]
    return "\n".join([*files, "# commands that submit them", *map(shlex.join, commands)])


def _check_size(count: int) -> None:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm(["scontrol", "show", "config"]), re.MULTILINE)
    if found is not None and count > int(found[1]):
        raise UsageError(
            f"--array is {count}; this site takes at most {found[1]} (Slurm's MaxArraySize): give fewer shards"
        )


def _sbatch(command: list[str]) -> str:
    """Submit a job. Returns its id; sbatch prints ID or ID;CLUSTER."""
    return _slurm(command).strip().split(";")[0]


def _slurm(command: list[str]) -> str:
    """Run a command of Slurm. Returns what it prints. Raises `Refused` with its error message."""
    if shutil.which(command[0]) is None:
        raise Refused(
            f"{command[0]} is not installed: submit on a machine of a Slurm cluster; --dry-run shows what would be "
            "submitted"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{command[0]} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
