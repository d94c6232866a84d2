"""A job from its spec to its report: open, check, run, merge; nothing is written before all is known to fit."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from batchinfer.config import EngineConfig, EngineStats
from batchinfer.jobs.canary import Canary, Comparison, canary_rows, reference_config, run_canary
from batchinfer.jobs.device import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, device_of
from batchinfer.jobs.done import Done
from batchinfer.jobs.durable import sha256, write_json
from batchinfer.jobs.fingerprints import fingerprints
from batchinfer.jobs.hub import TOKENIZER_FILES, context_length, resolve_model
from batchinfer.jobs.ids import check_ids
from batchinfer.jobs.interruption import Interruption
from batchinfer.jobs.loop import Loop
from batchinfer.jobs.parts import RunFolder
from batchinfer.jobs.planner import JobPlan
from batchinfer.jobs.prompts import PromptSource
from batchinfer.jobs.reader import Table
from batchinfer.jobs.report import SCHEMA_VERSION, Report, peak_memory_bytes, rates, read_report, versions
from batchinfer.jobs.results import Results
from batchinfer.jobs.schema import RESULT_FIELDS
from batchinfer.jobs.spec import EngineFailed, JobSpec, Refused
from batchinfer.jobs.windows import Prompts, Windows
from batchinfer.jobs.worker import TORCH_ENGINE, Load, Worker, run_engine
from batchinfer.tokenizer import Tokenizer

MERGE_ROWS = 8192

PromptsFactory = Callable[[JobSpec, Tokenizer, int, pa.Schema], Prompts]


def run(spec: JobSpec, engine: str = TORCH_ENGINE, prompts: PromptsFactory = PromptSource) -> Report:
    """Run a job to its end, or go on with one: when this returns, `spec.output` is there, whole.

    Raises `Refused` (the data, the model or the output), `EngineFailed`, `Interrupted`, `OSError` (the disk). Then the
    output is absent, and the parts that were committed stay.
    """
    # The system's own allocator gives large cells back at once; pyarrow's keeps what it had for a while.
    pa.set_memory_pool(pa.system_memory_pool())
    with closing(RunFolder(spec.output)) as folder:
        return _run(folder, spec, engine, prompts)


def _run(folder: RunFolder, spec: JobSpec, engine: str, prompts: PromptsFactory) -> Report:
    started = time.monotonic()
    folder.refuse_foreign()
    if not (spec.resume or spec.overwrite) and folder.begun:
        raise Refused(f"{folder.path} or {spec.output} is there, and --no-resume starts only in an empty place")
    whole = Table.open(spec.inputs)
    table = whole if spec.shard is None else whole.shard(*spec.shard)
    kept = _kept_columns(spec, table)
    model = resolve_model(spec.model, spec.revision, tokenizer=spec.tokenizer is None)
    tokenizer_folder = None if spec.tokenizer is None else resolve_model(spec.tokenizer, None, TOKENIZER_FILES)
    config = _engine_config(spec, model, table.num_rows)
    tokenizer = _load_tokenizer(model, tokenizer_folder)
    source = prompts(spec, tokenizer, config.max_model_len, table.schema)
    if spec.id_column is not None:
        check_ids(whole, spec.id_column)
    digests = fingerprints(spec, model, tokenizer.fingerprint, config, kept)
    reference = reference_config(spec, config) if spec.canary else None
    resolved = {
        "command": shlex.join(sys.argv),
        "spec": asdict(spec),
        "engine": asdict(config),
        "canary_engine": None if reference is None else asdict(reference),
        "versions": versions(),
    }

    canary = None
    if reference is not None and (spec.overwrite or not folder.begun):  # before what an earlier run left is removed
        comparison = Comparison(spec, config, reference, tokenizer_folder, canary_rows(table, source, spec.canary))
        with Interruption() as interruption:
            canary = run_canary(comparison, interruption)

    done = folder.open(resolved, digests, table.num_rows, spec.overwrite, spec.retry_errors)
    if folder.published and done.complete:
        print(f"batchinfer: {spec.output} is complete already", file=sys.stderr, flush=True)
        return read_report(spec.output)
    stats, generating = EngineStats(notes=_resumed(done, digests)), 0.0
    try:
        windows = Windows(table, source, spec.block_size, done.rows)
        results = Results(spec, tokenizer, folder, done)
        if not done.complete:
            print(f"batchinfer: loading {spec.model}", file=sys.stderr, flush=True)
            deadline = None if spec.time_limit is None else started + spec.time_limit
            with Interruption(deadline) as interruption:
                loop = Loop(spec, windows, results, partial(Worker, folder.log, run_engine, engine), table.num_rows)
                found = loop.run(Load(config, tokenizer_folder), interruption)
            stats, generating = replace(found, notes=found.notes + stats.notes), loop.generate_seconds
        folder.write_manifest(table.num_rows)
        merging = time.monotonic()
        input_columns = pa.schema([table.schema.field(c) for c in kept])
        merged = folder.merge(input_columns, table.batches(kept, MERGE_ROWS), table.num_rows)
    except EngineFailed:
        raise  # its log is in the folder
    except BaseException:
        folder.remove_if_empty()
        raise
    finished = time.monotonic()
    phases = {
        "load": stats.load_seconds,
        "tokenize": windows.seconds,
        "prefill": stats.prefill_seconds,
        "decode": stats.decode_seconds,
        "commit": results.commit_seconds,
        "merge": finished - merging,
    }
    wall = finished - started
    report = _report(spec, results, done, windows.plan, stats, phases, generating, wall, canary, sha256(merged))
    write_json(folder.report, asdict(report))
    folder.publish(merged)
    return report


def _resumed(done: Done, digests: dict[str, str]) -> list[str]:
    """For the report: that rows were there before, and whether another engine computed them."""
    if not done.count:
        return []
    others = done.engines - {digests["engine"]}
    by = ", some by another version or device of batchinfer" if others else ""
    return [f"{done.count:,} of the rows were done when this run began{by}: times and rates are of the others"]


def _kept_columns(spec: JobSpec, table: Table) -> list[str]:
    kept = table.schema.names if spec.columns is None else list(spec.columns)
    table.check(kept)
    clash = [field.name for field in RESULT_FIELDS if field.name in kept]
    if clash:
        raise Refused(
            f"{spec.inputs[0]} has a column {clash[0]!r}, which the output needs for itself; rename it, or name the "
            "columns to keep with --columns"
        )
    return kept


def _load_tokenizer(model: Path, folder: Path | None) -> Tokenizer:
    try:
        return Tokenizer.load(model, folder)
    except ValueError as error:
        raise Refused(f"tokenizer: {error}") from error


def _engine_config(spec: JobSpec, model: Path, rows: int) -> EngineConfig:
    device = device_of(spec)
    max_num_seqs = MAX_NUM_SEQS[device] if spec.max_num_seqs is None else spec.max_num_seqs
    tokens = MAX_NUM_BATCHED_TOKENS[device] if spec.max_num_batched_tokens is None else spec.max_num_batched_tokens
    return EngineConfig(
        model=model,
        device=device,
        dtype=spec.dtype,
        quantization=spec.quantization,
        kv_cache_dtype=spec.kv_cache_dtype,
        max_model_len=context_length(model, spec.max_model_len),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        block_size=spec.block_size,
        expected_batch=min(max_num_seqs, rows),
        random_weights=spec.random_weights,
        deterministic=spec.deterministic,
        gpu_memory_utilization=spec.gpu_memory_utilization,
    )


def _report(
    spec: JobSpec,
    results: Results,
    done: Done,
    plan: JobPlan,
    stats: EngineStats,
    phases: dict[str, float],
    generating: float,
    wall: float,
    canary: Canary | None,
    digest: str,
) -> Report:
    new_input = results.prompt_tokens - done.prompt_tokens
    new_output = results.completion_tokens - done.completion_tokens
    tokens = {
        "prefill": stats.prompt_tokens,
        "decode": stats.completion_tokens,
        "input": new_input,
        "output": new_output,
        "total": new_input + new_output,
    }
    seconds = {kind: phases.get(kind, generating) for kind in tokens}
    busy = stats.prefill_seconds + stats.decode_seconds
    ideal = busy * stats.peak_operations_per_second
    return Report(
        schema_version=SCHEMA_VERSION,
        output=str(spec.output),
        model=spec.model,
        rows=results.rows,
        rows_ok=results.rows - results.failed,
        rows_failed=results.failed,
        rows_resumed=done.count,
        rows_computed=results.rows - done.count,
        rows_duplicate=0,
        rows_by_finish_reason=dict(results.by_reason),
        rows_by_error=dict(results.by_error),
        prompt_tokens=results.prompt_tokens,
        prompt_tokens_computed=stats.prompt_tokens,
        completion_tokens=results.completion_tokens,
        drafted=0,
        accepted=0,
        steps=stats.steps,
        preemptions=stats.preemptions,
        padded_tokens=stats.padded_tokens,
        step_sizes={str(size): count for size, count in sorted(stats.step_sizes.items())},
        buckets={str(edge): rows for edge, rows in plan.buckets.items() if rows},
        phases=phases,
        generate_seconds=generating,
        wall_seconds=wall,
        tokens_per_second=rates(tokens, seconds),
        rows_per_second=(results.rows - done.count) / generating if generating > 0 else 0.0,
        operations=stats.operations,
        peak_operations_per_second=stats.peak_operations_per_second,
        percent_of_peak=100 * stats.operations / ideal if ideal > 0 else None,
        peak_memory_bytes={"parent": peak_memory_bytes(), "engine": stats.peak_memory_bytes}
        | ({"gpu": stats.peak_device_bytes} if stats.peak_device_bytes else {}),
        weight_bytes=stats.weight_bytes,
        kv_cache_bytes=stats.kv_cache_bytes,
        device=stats.device,
        kernels=stats.kernels,
        notes=stats.notes,
        versions=versions(),
        command=shlex.join(sys.argv),
        canary=canary,
        output_sha256=digest,
    )
