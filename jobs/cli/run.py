"""The command that runs a job, and the job that its arguments stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from batchinfer.engine.request import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.options import (
    BlockSize,
    Deterministic,
    Device,
    Dtype,
    GpuMemoryUtilization,
    KvCacheDtype,
    KvCacheMemoryBytes,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    Quantization,
    Revision,
    Seed,
    SpeculativeConfig,
)
from batchinfer.jobs.cli.speculation import speculation_of
from batchinfer.jobs.flag_values import delimiter_of, number_or_auto, read_job_file, seconds_of, shard_of
from batchinfer.jobs.spec import JobSpec, sharded

app = typer.Typer()


def _use_job_file(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        names = {str(parameter.name) for parameter in context.command.params} - {"config", "inputs"}
        values = read_job_file(path, names | {"input"})
        context.default_map = {"inputs" if key == "input" else key: value for key, value in values.items()}
    return path


def job_of(arguments: Sequence[str], output: Path | None = None) -> JobSpec:
    """The job that `batchinfer run` with these arguments would run. Raises `UsageError` and typer's exceptions.

    `output` stands where they name none.
    """
    jobs: list[JobSpec] = []
    default = [] if output is None else [f"--output={output}"]  # of an option that is there twice the last counts
    app([*default, *arguments], prog_name="batchinfer run", obj=jobs.append, standalone_mode=False)
    if not jobs:
        raise UsageError("these are no arguments of a job, but a question about them")
    return jobs[0]


@app.command()
def run(
    context: typer.Context,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT...", help="Parquet, JSON Lines, CSV or TSV, or folders of them; several are one table."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="OUT.parquet, OUT.jsonl, or a folder of Parquet files; OUT.run/ is made beside it."
        ),
    ] = None,
    model: Model = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another one than the model's own.")] = None,
    revision: Revision = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of prompts; 'prompt' if nothing is said.")
    ] = None,
    prompt_template: Annotated[str | None, typer.Option(help="A prompt made of columns: 'Summarize: {title}'.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="A column of lists of {role, content}.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="The first message of every chat.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    allow_special_tokens: Annotated[
        bool, typer.Option(help="Prompts may hold control tokens: rendered before.")
    ] = False,
    id_column: Annotated[str | None, typer.Option(help="Seeds come from this column instead of the prompt.")] = None,
    csv_delimiter: Annotated[
        str | None, typer.Option(metavar="CHARACTER", help=r"Stands between the values of .csv files: ';', '|', \t.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Input columns to keep, comma-separated; else all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Samples of every row; the first is as without.")] = 1,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Do not end at end-of-text.")] = False,
    quantization: Quantization = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: Annotated[
        str, typer.Option(metavar="N|auto", help="Tokens of prompt and answer together, at most.")
    ] = "auto",
    max_num_seqs: MaxNumSeqs = "auto",
    max_num_batched_tokens: MaxNumBatchedTokens = "auto",
    block_size: BlockSize = 32,
    deterministic: Deterministic = False,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_memory_bytes: KvCacheMemoryBytes = "auto",
    speculative_config: SpeculativeConfig = None,
    draft_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model with the same tokenizer, which drafts tokens.")
    ] = None,
    commit_rows: Annotated[int, typer.Option(help="Commit finished rows when there are so many,")] = 10_000,
    commit_seconds: Annotated[float, typer.Option(help="or after so long.")] = 30.0,
    max_error_rate: Annotated[float, typer.Option(help="Give up when a larger share of the rows failed.")] = 1.0,
    canary: Annotated[
        int, typer.Option(metavar="N", help="First compare N of the rows with the model without quantization.")
    ] = 0,
    canary_reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this one: for a checkpoint that is quantized.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts of the rows, into OUT-I-of-N.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after so long, with exit code 75: minutes, or [DAYS-]HH:MM:SS."),
    ] = None,
    step_timeout: Annotated[
        float, typer.Option(help="Replace the engine when it took no step for so many seconds.")
    ] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds from a signal, or the time limit, to the end.")] = 30.0,
    retry_errors: Annotated[bool, typer.Option(help="Run the rows that failed in an earlier run again.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an earlier run, or begin only in an empty place.")] = True,
    incremental: Annotated[
        bool,
        typer.Option(help="Run the rows that are new since the last run, into one more file of the output folder."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier output and its run folder.")] = False,
    metrics_textfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE.prom", help="Figures for Prometheus' node_exporter, written anew each minute."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(callback=_use_job_file, is_eager=True, help="A TOML file with these flags as keys."),
    ] = None,
) -> None:
    """Answer every row of a table: the output has its rows, in order, and the answers."""
    if output is None or model is None:
        raise UsageError(f"{'--output' if output is None else '--model'} is missing")
    if prompt_template is None and messages_column is None:
        prompt_column = prompt_column or "prompt"
    part = None if shard is None else shard_of(shard)
    spec = JobSpec(
        inputs=tuple(inputs or ()),
        output=output if part is None else sharded(output, *part),
        shard=part,
        model=model,
        revision=revision,
        tokenizer=tokenizer,
        prompt_column=prompt_column,
        prompt_template=prompt_template,
        messages_column=messages_column,
        system_prompt=system_prompt,
        chat=chat,
        allow_special_tokens=allow_special_tokens,
        id_column=id_column,
        sampling=_sampling(max_tokens, temperature, top_k, top_p, min_p, tuple(stop or ()), ignore_eos),
        n=n,
        seed=seed,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=number_or_auto("--max-model-len", max_model_len),
        max_num_seqs=number_or_auto("--max-num-seqs", max_num_seqs),
        max_num_batched_tokens=number_or_auto("--max-num-batched-tokens", max_num_batched_tokens),
        block_size=block_size,
        deterministic=deterministic,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=number_or_auto("--kv-cache-memory-bytes", kv_cache_memory_bytes),
        speculation=speculation_of(speculative_config, draft_model),
        csv_delimiter=None if csv_delimiter is None else delimiter_of(csv_delimiter),
        columns=tuple(name for names in columns for name in names.split(",") if name) if columns else None,
        commit_rows=commit_rows,
        commit_seconds=commit_seconds,
        max_error_rate=max_error_rate,
        overwrite=overwrite,
        resume=resume,
        retry_errors=retry_errors,
        incremental=incremental,
        time_limit=None if time_limit is None else seconds_of("--time-limit", time_limit),
        grace=grace,
        step_timeout=step_timeout,
        canary=canary,
        canary_reference=canary_reference,
        metrics_textfile=metrics_textfile,
    )
    if context.obj is not None:  # somebody else's question: which job is it?
        context.obj(spec)
        return
    from batchinfer.jobs import job
    from batchinfer.jobs.incremental import run_new_rows

    done = run_new_rows(spec, job.run) if incremental else job.run(spec)
    print(done.table())
    if done.rows and not done.rows_ok:
        raise Refused(f"every row failed; {output} has each one's error_code and error_message")


def _sampling(*values: Any) -> SamplingParams:
    max_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos = values
    try:
        return SamplingParams(max_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from error
