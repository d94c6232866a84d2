"""Fingerprints of a job: digests of all that its results depend on. A part with other digests is of another job."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.host.files import sha256
from batchinfer.jobs.spec import JobSpec

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
FIELDS_OF_EVERY_JOB = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos")


def fingerprints(
    spec: JobSpec, inputs: Sequence[Path], model: Path, tokenizer: str, config: EngineConfig, columns: list[str]
) -> dict[str, str]:
    """Return the fingerprints by name: a sha256 each for columns, input, model, tokenizer, template, sampling,
    quantization and engine; the shard; and the delimiter of CSV files if it is not a comma.

    Input files are read completely. Of weights, which are large and differ everywhere if they differ at all, 64 samples
    of each file are read.
    """
    weights = sorted([*model.glob("*.safetensors"), *model.glob("*.gguf")])
    configs = sorted(model.glob("*config.json"))
    template = {
        "prompt_column": spec.prompt_column,
        "prompt_template": spec.prompt_template,
        "messages_column": spec.messages_column,
        "system_prompt": spec.system_prompt,
        "chat": spec.chat,
        "allow_special_tokens": spec.allow_special_tokens,
        "id_column": spec.id_column,
    }
    # With another delimiter, the same bytes are another table. Rows set aside for an incremental run have none.
    delimiter = {} if spec.csv_delimiter in (None, ",") or spec.adds_file else {"csv_delimiter": spec.csv_delimiter}
    return {
        **delimiter,
        "columns": _digest(columns),
        "shard": "" if spec.shard is None else "{} of {}".format(*spec.shard),
        "input": _digest([sha256(path) for path in inputs]),
        "model": _digest([[path.name, sha256(path)] for path in configs] + [[p.name, _sampled(p)] for p in weights]),
        "tokenizer": tokenizer,
        "template": _digest(template),
        "sampling": _digest(
            {**_chosen(spec.sampling), "n": spec.n, "seed": spec.seed, "max_model_len": config.max_model_len}
        ),
        "quantization": _digest(
            [spec.quantization, spec.kv_cache_dtype, spec.dtype, spec.random_weights, config.few_rows]
        ),
        "engine": _digest([__version__, config.device, config.deterministic]),
    }


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
