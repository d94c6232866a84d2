"""Fingerprints of a job: digests of all that its results depend on. A part with other digests is of another job."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.flag import flags_of
from batchinfer.host.files import sha256
from batchinfer.jobs.label_flags import LabelFlags
from batchinfer.jobs.score_flags import ScoreFlags
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.structure_flags import StructureFlags
from batchinfer.jobs.tables.input_file import InputFile
from batchinfer.kernels.cpu_library import REFERENCE

OPENAI_BATCH = "openai-batch"
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
FIELDS_OF_EVERY_JOB = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos")


def fingerprints(
    spec: JobSpec,
    inputs: Sequence[InputFile],
    model: Path,
    tokenizer: str,
    config: EngineConfig,
    columns: list[str],
    moment: datetime | None = None,
    tool_template: str = "",
    chosen: str = "",
) -> dict[str, str]:
    """Return the fingerprints by name: a sha256 each for columns, input, model, tokenizer, template, sampling,
    quantization and engine; the shard; the delimiter and the encoding of CSV files if they are not a comma and UTF-8;
    the selection of rows, if there is one; the format of input and output, if these are not tables; the `moment` that
    the chat template writes into prompts, if it does; the parsers of answers, if there are any; and the
    path of a CPU's kernels, if they are not torch's operations.

    `chosen` is a digest of the selected rows. `tool_template` is the source of the chat template for conversations with
    tools. Input files are read completely, and columns that their folders give count too.
    """
    template = {
        "prompt_column": spec.prompt_column,
        "prompt_template": spec.prompt_template,
        "messages_column": spec.messages_column,
        "system_prompt": spec.system_prompt,
        "chat": spec.chat,
        "allow_special_tokens": spec.allow_special_tokens,
        "id_column": spec.id_column,
    }
    added = [*flags_of(StructureFlags), *flags_of(ScoreFlags)]
    template |= {name: value for name in added if (value := getattr(spec, name))}
    if spec.tools_column is not None:
        template |= {"tools_column": spec.tools_column, "tool_template": tool_template}
    template |= _of_chats(spec, tool_template)
    if spec.openai_batch:  # requests name the model
        template |= {"any_model": spec.any_model, "model": None if spec.any_model else spec.model}
    # Read in another way, the same bytes are another table. Rows set aside for an incremental run are not CSV.
    csv = {"csv_delimiter": (spec.csv_delimiter, ","), "csv_encoding": (spec.csv_encoding, "utf-8")}
    unusual = {name: given for name, (given, usual) in csv.items() if given not in (None, usual)}
    # Each part of an incremental job has a moment of its own.
    template_date = {} if moment is None or spec.adds_file else {"template_date": moment.isoformat()}
    selection = [spec.where, spec.sample, spec.limit]
    return {
        **({} if spec.adds_file else unusual),
        **({} if selection == [None, None, None] else {"selection": _digest([*selection, chosen])}),
        **template_date,
        **({"format": OPENAI_BATCH} if spec.openai_batch else {}),
        **{name: form for name, form in _parsers(spec).items() if form is not None},
        **({"cpu_path": config.cpu_path} if config.cpu_path != REFERENCE else {}),
        "columns": _digest(columns),
        "shard": "" if spec.shard is None else "{} of {}".format(*spec.shard),
        "input": _digest([_of_input(file) for file in inputs]),
        "model": model_digest(model),
        "tokenizer": tokenizer,
        "template": _digest(template),
        "sampling": _digest(
            {
                **_chosen(spec.sampling),
                **({name: getattr(spec, name) for name in flags_of(LabelFlags)} if spec.chooses else {}),
                **({} if spec.sampling_params_column is None else {"column": spec.sampling_params_column}),
                "n": spec.n,
                "seed": spec.seed,
                "max_model_len": config.max_model_len,
            }
        ),
        "quantization": _digest(
            [spec.quantization, spec.kv_cache_dtype, spec.dtype, spec.random_weights, config.few_rows]
        ),
        "engine": _digest([__version__, config.device, config.deterministic]),
    }


def model_digest(model: Path) -> str:
    """Return the sha256 of a model's configs and of 64 samples of each file of weights, which are large and differ
    everywhere if they differ at all."""
    weights = sorted([*model.glob("*.safetensors"), *model.glob("*.gguf")])
    configs = sorted(model.glob("*config.json"))
    return _digest([[path.name, sha256(path)] for path in configs] + [[p.name, _sampled(p)] for p in weights])


def _of_chats(spec: JobSpec, tool_template: str) -> dict[str, Any]:
    """Return what `ChatFlags` add to the digest of the template, files by their content: nothing without them."""
    files = {"chat_template": spec.chat_template, "tools": spec.tools}
    found: dict[str, Any] = {name: sha256(file) for name, file in files.items() if file is not None}
    values = {
        "chat_template_kwargs": spec.chat_template_kwargs,
        "chat_template_kwargs_column": spec.chat_template_kwargs_column,
        "tool_template": None if spec.tools is None else tool_template,
    }
    return found | {name: value for name, value in values.items() if value is not None}


def _parsers(spec: JobSpec) -> dict[str, str | None]:
    return {"reasoning_parser": spec.reasoning_format, "tool_parser": spec.tool_format}


def _of_input(file: InputFile) -> Any:
    digest = sha256(file.path)
    return [digest, {name: str(value) for name, value in file.keys.items()}] if file.keys else digest


def _chosen(sampling: SamplingParams) -> dict[str, Any]:
    """Return the fields that the digest of every job has, and those that are set: a job that was begun before a
    field was there goes on."""
    every, default = FIELDS_OF_EVERY_JOB, asdict(SamplingParams())
    return {name: value for name, value in asdict(sampling).items() if name in every or value != default[name]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sampled(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
