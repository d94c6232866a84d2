"""Storing what quantization was found to cost in quality: a file in the user's cache for each model.

`batchinfer evaluate --reference` and `run --canary` measure it; `batchinfer plan` compares ways to run a job by it.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchinfer.engine.config import EngineConfig
from batchinfer.host.user_cache import user_cache
from batchinfer.jobs.plan.prediction import Setting
from batchinfer.jobs.results.durable import write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Quality:
    """How far a model in some setting is from its reference."""

    divergence: float  # mean Kullback-Leibler divergence from the reference, in nats a token
    top1_agreement: float  # share of tokens for which both models' likeliest next token is the same
    tokens: int  # that were compared
    reference: str
    found_by: str  # the command

    def __str__(self) -> str:
        return (
            f"KL {self.divergence:.2g} nats a token, top-1 {100 * self.top1_agreement:.1f} % ({self.found_by}, "
            f"{self.tokens:,} tokens beside {self.reference})"
        )


def quality_key(config: EngineConfig) -> str:
    """Return the name under which the quality of a model is stored as this config runs it."""
    setting, head = Setting.of(config), "+head" if config.quantization.endswith("+head") else ""
    return f"{setting.products}{head}, KV {setting.kv_cache}"


def read_qualities(model: str) -> dict[str, Quality]:
    """Return what is known of a model, by `quality_key`; `model` is the digest that fingerprints it.

    Nothing is known if the file is missing or damaged: it can be measured again.
    """
    try:
        values = json.loads(_path(model).read_bytes())
        if (values["schema_version"], values["model"]) != (SCHEMA_VERSION, model):
            return {}
        return {key: _parsed(found) for key, found in values["settings"].items()}
    except (OSError, RuntimeError, RecursionError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_quality(model: str, config: EngineConfig, quality: Quality) -> list[str]:
    """Add the quality of a model as this config runs it. Returns notes: why it could not be stored, if it could not."""
    settings = read_qualities(model) | {quality_key(config): quality}
    values = {"schema_version": SCHEMA_VERSION, "model": model}
    try:
        path = _path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values | {"settings": {key: asdict(found) for key, found in settings.items()}})
    except (OSError, RuntimeError) as error:
        return [f"what was found is not kept for `batchinfer plan` ({error}); set XDG_CACHE_HOME to a folder for it"]
    return []


def _path(model: str) -> Path:
    return user_cache() / "qualities" / f"{model[:16]}.json"


def _parsed(values: Any) -> Quality:
    quality = Quality(**values)
    numbers = (quality.divergence, quality.top1_agreement, quality.tokens)
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers):
        raise ValueError(f"figures are {numbers}")
    if not (isinstance(quality.reference, str) and isinstance(quality.found_by, str)):
        raise TypeError("names that are no text")
    return quality
