"""Opening, resolving and checking all parts of a job, so that errors are found before its first row."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from batchinfer.engine.check_settings import check_types
from batchinfer.engine.config import EngineConfig, Speculation, blocks_of
from batchinfer.engine.drafts.draft_folder import resolve_draft_model
from batchinfer.engine.generation_config import GenerationConfig, Settings
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_texts import in_token_ids, refuse_unknown_ids
from batchinfer.errors import Refused, UsageError
from batchinfer.host.device import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, device_of, products_of, refuse_old_gpu
from batchinfer.jobs.answer_parsers import with_parsers
from batchinfer.jobs.field_reordering import with_field_order
from batchinfer.jobs.fingerprints import fingerprints
from batchinfer.jobs.given_in_vain import given_in_vain
from batchinfer.jobs.job_columns import fields_of
from batchinfer.jobs.log import say
from batchinfer.jobs.openai_batch.custom_ids import repeated
from batchinfer.jobs.openai_batch.responses import COLUMNS
from batchinfer.jobs.openai_batch.source import RequestSource
from batchinfer.jobs.results.formats import format_of
from batchinfer.jobs.rows.prompts import PromptSource, verbatim_columns
from batchinfer.jobs.rows.sampling import may_list_samples
from batchinfer.jobs.rows.template_check import check_template
from batchinfer.jobs.rows.windows import Prompts
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.ids import check_ids
from batchinfer.jobs.tables.selection import Selection, digest
from batchinfer.jobs.tables.table import Table, find_field
from batchinfer.jobs.template_date import known_moment, moment_of_prompts, notes_about, now
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path
from batchinfer.models.config import ModelConfig, read_model_config, read_shape
from batchinfer.models.gguf_folder import weight_files
from batchinfer.models.hub import TOKENIZER_FILES, resolve_model
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.grammars import check_grammar, refuse_tokenizer
from batchinfer.text.tokenizer import Tokenizer

PromptsFactory = Callable[[JobSpec, Tokenizer, int, pa.Schema], Prompts]


@dataclass(frozen=True)
class Preflight:
    """The checked input, model and settings of a job."""

    spec: JobSpec  # with the sampling params that the checkpoint's settings and the tokenizer make of the user's
    generation_config: Settings  # of the checkpoint
    table: Table
    kept: list[str]  # input columns that the output keeps
    config: EngineConfig
    tokenizer: Tokenizer
    tokenizer_folder: Path | None  # None: the model's own
    source: Prompts
    fingerprints: dict[str, str]
    shape: ModelConfig  # without quantization
    notes: list[str]  # for the report and the plan


def preflight(spec: JobSpec, prompts: PromptsFactory = PromptSource) -> Preflight:
    """Check a job. Raises `Refused` if the data or the model do not fit, and `UsageError` if flags do not."""
    _check_structure(spec)
    selection = Selection(spec.where, spec.sample, spec.limit, spec.seed)
    verbatim = verbatim_columns(spec)
    whole = selection.of(
        Table.open(spec.inputs, spec.csv_delimiter, spec.csv_encoding, verbatim, lines=spec.openai_batch)
    )
    table = whole if spec.shard is None else whole.shard(*spec.shard)
    if spec.sampling_params_column is not None:
        kind = find_field(table.schema, spec.sampling_params_column, spec.inputs[0]).type
        spec = replace(spec, samples_by_row=may_list_samples(kind))
    if spec.openai_batch:
        spec = replace(spec, samples_by_row=True)
    kept = _kept_columns(spec, table)
    if not spec.openai_batch:
        format_of(spec.output).refuse_unfit(pa.schema([table.schema.field(name) for name in kept]))
    model = resolve_model(spec.model, spec.revision, tokenizer=spec.tokenizer is None)
    shape = read_shape(model)
    tokenizer_folder = None if spec.tokenizer is None else resolve_model(spec.tokenizer, None, TOKENIZER_FILES)
    config = _engine_config(spec, model, shape, whole.num_rows)
    known = known_moment(spec)
    tokenizer = _load_tokenizer(model, tokenizer_folder, shape.vocab_size, known or now(), spec.chat_template)
    named = spec.tokenizer or spec.model
    if spec.sampling.structure is not None or spec.json_schema_column is not None:
        try:
            refuse_tokenizer(tokenizer)
        except ValueError as error:
            raise Refused(f"tokenizer of {named}: {error}") from error
    # Rows that choose from labels know all their tokens.
    wanted = Speculation("off") if spec.chooses else spec.speculation
    speculation = resolve_draft_model(wanted, named, tokenizer, config.max_model_len)
    if config.device == "cuda" and speculation.model is not None:
        try:
            _refuse_on_gpu(speculation.model, read_shape(speculation.model), "auto", spec.random_weights)
        except ValueError as error:
            raise Refused(f"draft model {wanted.model}: {error}") from error
    config = replace(config, speculation=speculation)
    spec, settings, lines = _resolved_sampling(spec, model, shape.vocab_size, tokenizer)
    if spec.id_column is not None:
        check_ids(whole, spec.id_column)
    templates = _chat_templates(spec, tokenizer, tokenizer_folder or model)
    moment = moment_of_prompts(spec, templates, known)
    for template in templates:
        arguments = spec.chat_template_kwargs or {}
        check_template(template, str(spec.chat_template or named), arguments, spec.arguments_differ)
    before = spec
    spec, parsers = with_parsers(spec, templates, tokenizer)
    _refuse_clash(spec, before, kept)
    spec, ordered = with_field_order(spec, whole)
    source = _source(spec, tokenizer, config.max_model_len, table, whole, prompts)
    vain = given_in_vain(spec, templates, table)
    notes = [*whole.notes, *selection.note(whole), *lines, *notes_about(spec, moment), *vain, *parsers, *ordered]
    for note in (*shape.notes, *notes):
        say(note)
    # An incremental job's input may change. Its runs read the new rows from a file in which they were set aside.
    inputs, chosen = ((), "") if spec.adds_file else (whole.files, digest(whole))
    tool_template = templates[-1].source if templates else ""
    digests = fingerprints(spec, inputs, model, tokenizer.fingerprint, config, kept, moment, tool_template, chosen)
    return Preflight(spec, settings, table, kept, config, tokenizer, tokenizer_folder, source, digests, shape, notes)


def _source(
    spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, table: Table, whole: Table, prompts: PromptsFactory
) -> Prompts:
    """Return what makes requests of the table's rows; `whole` is the table of all shards."""
    if not spec.openai_batch:
        return prompts(spec, tokenizer, max_model_len, table.schema)
    first = table.skipped or 0
    taken = {row - first: number for row, number in repeated(whole).items()}
    return RequestSource(spec, tokenizer, max_model_len, taken)


def _check_structure(spec: JobSpec) -> None:
    if (structure := spec.sampling.structure) is not None:
        try:
            check_grammar(structure)
        except ValueError as error:
            raise UsageError(f"--{structure[0].replace('_', '-')} {error}") from error


def _refuse_on_gpu(model: Path, shape: ModelConfig, quantization: str, random_weights: bool) -> None:
    """Raise `ValueError` if a GPU has no kernel for the layers or for the weights as the checkpoint stores them."""
    shape.refuse_on_gpu()
    if weight_files(model):
        return
    config = read_model_config(model)
    config.refuse_on_gpu()
    if config.form is not None and not random_weights:
        from batchinfer.models.experts_on_gpu import refuse_experts_on_gpu

        refuse_experts_on_gpu(model, config, quantization, products_of("cuda"))


def _kept_columns(spec: JobSpec, table: Table) -> list[str]:
    if spec.openai_batch:
        return COLUMNS
    kept = table.schema.names if spec.columns is None else list(spec.columns)
    table.check(kept)
    _refuse_clash(spec, spec, kept)
    return kept


def _refuse_clash(spec: JobSpec, given: JobSpec, kept: list[str]) -> None:
    """Raise `Refused` if a kept column has the name of a result. `given` is the job as the user gave it."""
    clash = [field.name for field in fields_of(spec) if field.name in kept]
    if clash:
        parsers = {"reasoning": given.reasoning_parser, "tool_calls": given.tool_parser}
        flag = "--reasoning-parser" if clash[0] == "reasoning" else "--tool-parser"
        without = f", or leave it in generated_text with {flag} none" if parsers.get(clash[0]) == "auto" else ""
        raise Refused(
            f"{spec.inputs[0]} has a column {clash[0]!r}, which the output adds itself; rename it, or name the "
            f"columns to keep with --columns{without}"
        )


def _load_tokenizer(
    model: Path, folder: Path | None, size: int, moment: datetime, chat_template: Path | None
) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(model, folder, moment, chat_template)
    except ValueError as error:
        raise Refused(f"tokenizer: {error}") from error
    except OSError as error:
        if chat_template is None or error.filename != str(chat_template):
            raise
        raise Refused(f"--chat-template {chat_template}: {error.strerror}; correct the path") from error
    if tokenizer.vocab_size > size:
        raise Refused(
            f"{(folder or model) / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, but vocab_size is {size} in "
            f"{model / 'config.json'}: they do not belong together: leave out --tokenizer, or take the model's own"
        )
    return tokenizer


def _chat_templates(spec: JobSpec, tokenizer: Tokenizer, folder: Path) -> list[ChatTemplate]:
    """Return the chat templates that the job uses. The one for conversations with tools is the last."""
    if tokenizer.template is None or not spec.renders_chats:
        return []
    try:
        tool_template = tokenizer.tool_template if spec.offers_tools else None
    except ValueError as error:
        raise Refused(f"tokenizer: {folder}: {error}") from error
    return [tokenizer.template] if tool_template in (None, tokenizer.template) else [tokenizer.template, tool_template]


def _resolved_sampling(
    spec: JobSpec, model: Path, size: int, tokenizer: Tokenizer
) -> tuple[JobSpec, Settings, list[str]]:
    """Return the job with the checkpoint's own settings and with token ids for texts, and what there is to tell."""
    try:
        refuse_unknown_ids(spec.sampling, size)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from error
    try:
        # The probabilities of labels are those that the model computes.
        choice = "none" if spec.chooses else spec.generation_config
        sampling = SamplingParams(max_tokens=1) if spec.chooses else spec.sampling
        params, settings = GenerationConfig.read(model, choice).applied_to(sampling, spec.sampling_given)
    except ValueError as error:
        raise Refused(f"model {error}") from error
    sampling, lines = in_token_ids(params, tokenizer)
    return replace(spec, sampling=sampling), settings, settings.lines() + lines


def _engine_config(spec: JobSpec, model: Path, shape: ModelConfig, rows: int) -> EngineConfig:
    """Return the engine's config: fields of the job with the same name, and those that depend on model, device or
    table. `rows` are those of the whole table, so that all shards compute in the same way, as the job does whole."""
    device = device_of(spec.device)
    try:
        path = cpu_path(spec.cpu_path) if device == "cpu" else REFERENCE
    except ValueError as error:
        raise UsageError(str(error).replace("cpu_path", "--cpu-path", 1)) from error
    if device == "cuda":
        try:
            refuse_old_gpu()
            _refuse_on_gpu(model, shape, spec.quantization, spec.random_weights)
        except ValueError as error:
            raise Refused(str(error)) from error
    block_size, grain = blocks_of(spec.block_size, path, states=bool(shape.recurrent))
    max_num_seqs = spec.max_num_seqs or MAX_NUM_SEQS[device]
    given = {field.name: getattr(spec, field.name) for field in fields(EngineConfig) if hasattr(spec, field.name)}
    resolved = {
        "model": model,
        "device": device,
        "cpu_path": path,
        "block_size": block_size,
        "prefix_grain": grain,
        "max_model_len": shape.max_positions if spec.max_model_len is None else spec.max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[device],
        # Incremental runs must all compute in the same way, even those with few rows.
        "expected_batch": _expected_batch(spec, max_num_seqs, rows),
    }
    config = EngineConfig(**given | resolved)
    try:
        check_types(config, products_of(device))
    except ValueError as error:
        raise Refused(str(error)) from error
    return config


def _expected_batch(spec: JobSpec, most: int, rows: int) -> int:
    """Return how many sequences usually run, at most `most`; a row that chooses from labels may take one for each."""
    if spec.incremental or spec.choices_column is not None or spec.sampled_by_row:
        return most
    return min(most, rows * spec.computed_samples * max(1, len(spec.choices)))
