"""Running a job from its spec to its report: check, run, merge. Nothing is written before all checks have passed."""

import shlex
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

import pyarrow as pa

from batchinfer.engine.config import EngineStats
from batchinfer.errors import EngineFailed, Refused, UsageError
from batchinfer.host import allocator
from batchinfer.jobs.canary import Canary, Comparison, canary_rows, kept_for_plans, reference_config, run_canary
from batchinfer.jobs.collector import Results
from batchinfer.jobs.dataset_card import dataset_card
from batchinfer.jobs.feed import Loop
from batchinfer.jobs.forecast import forecast
from batchinfer.jobs.heartbeat import Heartbeat
from batchinfer.jobs.job_columns import fields_of
from batchinfer.jobs.log import say
from batchinfer.jobs.metrics import Metrics
from batchinfer.jobs.openai_batch.responses import Responses
from batchinfer.jobs.preflight import PromptsFactory, preflight
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.process.messages import TORCH_ENGINE, Load
from batchinfer.jobs.process.worker import Worker, run_engine
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.report import SCHEMA_VERSION, Report, rates, read_report, versions
from batchinfer.jobs.report_forms import write_report
from batchinfer.jobs.results.done import Done
from batchinfer.jobs.results.durable import write_whole
from batchinfer.jobs.results.formats import is_folder
from batchinfer.jobs.results.glance import Glance
from batchinfer.jobs.results.output_writer import digest_of
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.results.valid_text import with_valid_text
from batchinfer.jobs.rows.duplicates import told_alike
from batchinfer.jobs.rows.length_figures import LengthFigures, bucketed
from batchinfer.jobs.rows.prompts import PromptSource
from batchinfer.jobs.rows.reuse import Reuse
from batchinfer.jobs.rows.windows import Windows
from batchinfer.jobs.run_state import RunState, peaks
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.timeline import Timeline

MERGE_ROWS = 8192


def run(spec: JobSpec, engine: str = TORCH_ENGINE, prompts: PromptsFactory = PromptSource) -> Report:
    """Run a job to its end, or continue an earlier run. When this returns, `spec.output` is complete.

    Raises `Refused` for wrong data, model or output, `EngineFailed`, `Interrupted`, and `OSError` from the disk. Then
    there is no output, and the committed parts are kept.
    """
    allocator.return_freed_memory()
    state = RunState()
    with (
        closing(RunFolder(spec.output)) as folder,
        Metrics(spec, folder, state) as metrics,
        Heartbeat(folder, state) as heartbeat,
        state,
    ):
        return _run(folder, state, metrics, heartbeat, spec, engine, prompts)


def _run(
    folder: RunFolder,
    state: RunState,
    metrics: Metrics,
    heartbeat: Heartbeat,
    spec: JobSpec,
    engine: str,
    prompts: PromptsFactory,
) -> Report:
    started = time.monotonic()
    folder.refuse_foreign()
    if not (spec.resume or spec.overwrite) and folder.begun:
        raise Refused(
            f"{folder.path} or {spec.output} exists, and --no-resume starts only a new job; choose another output"
        )
    if spec.openai_batch and spec.output.suffix != ".jsonl":
        raise UsageError(f"--output is {spec.output}; with --openai-batch its name must end in .jsonl")
    job = preflight(spec, prompts)
    spec = job.spec
    table, source, config, digests = job.table, job.source, job.config, job.fingerprints
    reference = reference_config(spec, config) if spec.canary else None
    resolved = {
        "command": shlex.join(sys.argv),
        "spec": asdict(spec),
        "engine": asdict(config),
        "canary_engine": None if reference is None else asdict(reference),
        "versions": versions(),
        "created": int(time.time()),
    }
    reuse = Reuse.of(spec.reuse, digests, fields_of(spec))
    state.rows = table.num_rows
    progress = Progress(state, metrics, heartbeat)

    canary = None
    if reference is not None and (spec.overwrite or not folder.begun):  # before the files of an earlier run are removed
        comparison = Comparison(spec, config, reference, job.tokenizer_folder, canary_rows(table, source, spec.canary))
        with Interruption() as interruption, folder.taken_before_open():
            heartbeat.begin("canary")
            canary = run_canary(comparison, interruption, progress.tick)
        job.notes.extend(kept_for_plans(canary, spec, config, digests["model"]))

    done = folder.open(resolved, digests, table.num_rows, spec.overwrite, spec.retry_errors)
    results = Results(spec, job.tokenizer, folder, done)
    state.results = results
    metrics.write()
    if folder.published and done.complete:
        say(f"{spec.output} is complete already; nothing is run", "complete")
        return read_report(spec.output)
    heartbeat.begin("reading")
    notes = [*job.notes, *_resumed(done, digests), *_sampled(spec)]
    stats, generating, duplicates = EngineStats(notes=notes), 0.0, 0
    try:
        windows = Windows(
            table,
            source,
            config.block_size,
            done.rows,
            folder.temporary,
            spec.deduplicate,
            spec.computed_samples,
            reuse=reuse,
            grain=config.prefix_grain,
        )
        timeline = Timeline(folder.timeline)
        if not done.complete:
            deadline = None if spec.time_limit is None else started + spec.time_limit
            with Interruption(deadline) as interruption:
                start_worker = partial(Worker, folder.log, run_engine, engine)
                loop = Loop(spec, windows, results, progress, timeline, start_worker, table.num_rows)
                found = loop.run(Load(config, job.tokenizer_folder, spec.lists_samples), interruption)
            stats = replace(found, notes=found.notes + stats.notes + told_alike(spec, windows.figures))
            generating, duplicates = loop.generate_seconds, loop.duplicates
        results.refuse_too_many_errors(table.num_rows)
        folder.write_manifest(table.num_rows)
        merging = time.monotonic()
        input_columns = pa.schema([table.schema.field(c) for c in job.kept], table.schema.metadata)
        batches = table.batches(job.kept, MERGE_ROWS // spec.most_samples)
        replaced: Counter[str] = Counter()
        valid = with_valid_text(progress.merging(batches), replaced)
        rewriting = None
        if spec.openai_batch:
            rewriting = Responses(spec.model, digests, table.skipped or 0, folder.created)
        glance = Glance(spec.report_samples, table.num_rows)
        merged = folder.merge(input_columns, valid, table.num_rows, fields_of(spec), rewriting, glance)
        stats = replace(stats, notes=stats.notes + timeline.notes + _replaced(replaced))
    except EngineFailed:
        raise  # the folder is kept, since the engine's log is in it
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
    report = _report(
        spec, results, done, duplicates, windows.figures, stats, phases, generating, wall, canary, digest_of(merged)
    )
    report = replace(
        report,
        replaced_text=dict(replaced),
        unparsed_tool_calls=results.unparsed_tool_calls,
        generation_config=asdict(job.generation_config),
        completion_lengths=bucketed(results.new_tokens),
        first_errors=dict(glance.first_errors),
        answers=glance.answers,
        settings={name: value for name, value in asdict(config).items() if name != "model"},
        ended=int(time.time()),
    )
    if engine == TORCH_ENGINE and results.new_tokens:
        report = replace(report, predicted=forecast(spec, config, windows.figures, results.new_tokens))
    write_report(folder, report, timeline.samples)
    if is_folder(spec.output) and not (spec.scores_texts or spec.completion_column):
        write_whole(folder.card, dataset_card(asdict(spec), report, config.model).encode())
    folder.publish(merged)
    state.phase = "done"
    return report


def _resumed(done: Done, digests: dict[str, str]) -> list[str]:
    """Note for the report that rows were done before, and whether another engine computed them."""
    if not done.count:
        return []
    others = done.engines - {digests["engine"]}
    by = ", some by another version or device of batchinfer" if others else ""
    return [f"{done.count:,} of the rows were done when this run began{by}; times and rates are for the other rows"]


def _sampled(spec: JobSpec) -> list[str]:
    """Note for the report that its completion tokens are those of all samples."""
    if not spec.lists_samples or spec.openai_batch:
        return []
    who = (
        "rows have the samples that --sampling-params-column says"
        if spec.samples_by_row
        else f"every row has {spec.n} samples (--n)"
    )
    said = f"{who}, and completion tokens are counted over all of them"
    same = "; at temperature 0 they are all the same, so only one is computed"
    return [said + (same if spec.computed_samples == 1 and not spec.samples_by_row else "")]


def _replaced(replaced: Counter[str]) -> list[str]:
    """Note for the report which kept columns had text that is not UTF-8, and what to do about it."""
    return [
        f"column {name!r} has U+FFFD in place of bytes that are not UTF-8 (values: {count:,}); if the input is CSV in "
        "another encoding, give the command again with --csv-encoding NAME --overwrite"
        for name, count in replaced.items()
    ]


def _report(
    spec: JobSpec,
    results: Results,
    done: Done,
    duplicates: int,
    figures: LengthFigures,
    stats: EngineStats,
    phases: dict[str, float],
    generating: float,
    wall: float,
    canary: Canary | None,
    digest: str,
) -> Report:
    new_rows = results.rows - done.count - results.reused["rows"]
    new_input = results.prompt_tokens - done.prompt_tokens - results.reused["prompt_tokens"]
    new_output = results.completion_tokens - done.completion_tokens - results.reused["completion_tokens"]
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
        rows_reused=results.reused["rows"],
        rows_computed=new_rows,
        rows_duplicate=duplicates,
        rows_by_finish_reason=dict(results.by_reason),
        rows_by_error=dict(results.by_error),
        prompt_tokens=results.prompt_tokens,
        prompt_tokens_computed=stats.prompt_tokens,
        prompt_tokens_shared=stats.shared_tokens,
        completion_tokens=results.completion_tokens,
        drafted=stats.drafted,
        accepted=stats.accepted,
        forced=stats.forced,
        steps=stats.steps,
        preemptions=stats.preemptions,
        gpu_steps={
            "replayed": stats.replayed_steps,
            "recorded": stats.recorded_steps,
            "launched": stats.launched_steps,
        },
        padded_tokens=stats.padded_tokens,
        step_sizes={str(size): count for size, count in sorted(stats.step_sizes.items())},
        buckets={str(edge): rows for edge, rows in figures.buckets.items() if rows},
        phases=phases,
        generate_seconds=generating,
        wall_seconds=wall,
        tokens_per_second=rates(tokens, seconds),
        rows_per_second=new_rows / generating if generating > 0 else 0.0,
        kv_bytes_read=stats.kv_bytes_read,
        kv_bytes_unshared=stats.kv_bytes_unshared,
        experts_touched=stats.experts_touched / max(stats.expert_layers, 1),
        operations=stats.operations,
        peak_operations_per_second=stats.peak_operations_per_second,
        peak_bytes_per_second=stats.peak_bytes_per_second,
        percent_of_peak=100 * stats.operations / ideal if ideal > 0 else None,
        peak_memory_bytes=peaks(stats),
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
