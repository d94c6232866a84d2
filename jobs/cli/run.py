"""The command that runs a job, and making a job from its arguments."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.flag import flags_of
from batchinfer.jobs.cli.flags import SectionedCommand, takes
from batchinfer.jobs.flag_values import read_job_file
from batchinfer.jobs.flags import FLAGS
from batchinfer.jobs.log import say, write_as, writes_json
from batchinfer.jobs.row_errors import ROW_ERRORS
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.speculation import speculation_of

app = typer.Typer()


def _use_job_file(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = read_job_file(path, {flag.name: flag for flag in FLAGS.values()})
        if context.default_map.get("log_format") == "json":  # also for errors in the other flags
            write_as("json")
    return path


def job_of(arguments: Sequence[str], output: Path | None = None) -> JobSpec:
    """Return the job that `batchinfer run` with these arguments would run. Raises `UsageError` and typer's exceptions.

    `output` is used if the arguments name no output.
    """
    jobs: list[JobSpec] = []
    default = [] if output is None else [f"--output={output}"]  # if an option is given twice, the last one counts
    app([*default, *arguments], prog_name="batchinfer run", obj=jobs.append, standalone_mode=False)
    if not jobs:
        raise UsageError(
            "these arguments ask for help and do not describe a job; give the arguments of 'batchinfer run' for a job"
        )
    return jobs[0]


@app.command(cls=SectionedCommand)
@takes(*FLAGS)
def run(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            callback=_use_job_file,
            is_eager=True,
            help="Read flags from this TOML file, which has their names as keys. The command line wins over the file.",
        ),
    ] = None,
    **values: Any,
) -> None:
    """Answer every row of a table, and write the table with its answers, in the order of the input."""
    write_as(values["log_format"])
    spec = _spec(values, tuple(name for name in flags_of(SamplingParams) if _is_given(context, name)))
    if context.obj is not None:  # `job_of` wants the job, and does not run it
        context.obj(spec)
        return
    carry_out(spec, values["output"])


def carry_out(spec: JobSpec, output: Path) -> None:
    """Run a job and print its report. Raises `Refused` if every row failed; `output` is as the user named it."""
    from batchinfer.jobs import job
    from batchinfer.jobs.incremental import run_new_rows

    done = run_new_rows(spec, job.run) if spec.incremental else job.run(spec)
    if writes_json():
        say("the job is complete", "report", report={**asdict(done), "answers": []})  # these are text of rows
    else:
        print(done.table())
    if done.rows and not done.rows_ok:
        what = "error" if spec.openai_batch else "error_code and error_message"
        raise Refused(f"every row failed, {_commonest(done.rows_by_error)}; {output} has the {what} of each")


def _commonest(rows_by_error: dict[str, int]) -> str:
    """Say which error most of the rows have, and what to do about it."""
    code, count = max(rows_by_error.items(), key=lambda item: item[1])
    which = "all" if len(rows_by_error) == 1 else f"{count:,} of {sum(rows_by_error.values()):,}"
    remedy = f" ({ROW_ERRORS[code].remedy})" if code in ROW_ERRORS else ""
    return f"{which} with {code}{remedy}"


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether the command line or the job file has a flag."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def _spec(values: dict[str, Any], sampling_given: tuple[str, ...]) -> JobSpec:
    """Make a job from the values of flags. Raises `UsageError`."""
    fields = fields_of(values)
    speculation = speculation_of(fields.pop("speculative_config"), fields.pop("draft_model"))
    sampling = _sampling({name: fields.pop(name) for name in flags_of(SamplingParams)})
    return JobSpec(**fields, sampling=sampling, sampling_given=sampling_given, speculation=speculation)


def fields_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of flags as a job's fields: with the default column, and the output of a shard.

    Raises `UsageError` if the output or the model is missing.
    """
    for name in ("output", "model"):
        if values[name] is None:
            raise UsageError(f"--{name} is missing; give it")
    fields = dict(values)
    others = ("prompt_template", "messages_column", "text_column", "openai_batch")
    if not any(fields.get(name) for name in others):
        fields["prompt_column"] = fields["prompt_column"] or "prompt"
    if fields["shard"] is not None:
        fields["output"] = sharded(fields["output"], *fields["shard"])
    return fields


def _sampling(values: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from error
