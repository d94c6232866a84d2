"""Parsing `--speculative-config` and `--draft-model`, which say how tokens are drafted: a method's name, or JSON with
the keys that other engines use."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from batchinfer.engine.config import METHODS, Speculation
from batchinfer.errors import UsageError
from batchinfer.flag import Flag

FLAG = "--speculative-config"
_KINDS: dict[str, tuple[type, str]] = {
    "method": (str, "a text"),
    "num_speculative_tokens": (int, "a whole number"),
    "model": (str, "a text"),
    "prompt_lookup_min": (int, "a whole number"),
    "prompt_lookup_max": (int, "a whole number"),
    "gate": (bool, "true or false"),
}
# Names in other engines -> names here.
_METHODS_ELSEWHERE = {
    "draft": "draft_model",
    "none": "off",
    "prompt_lookup": "ngram",
    "suffix_decoding": "suffix",
}
_KEYS_ELSEWHERE = {
    "draft_model": "model",
    "speculative_model": "model",
    "num_draft_tokens": "num_speculative_tokens",
    "prompt_lookup_num_tokens": "num_speculative_tokens",
    "max_matching_ngram_size": "prompt_lookup_max",
    "ngram_prompt_lookup_min": "prompt_lookup_min",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
}


@dataclass(frozen=True)
class SpeculationFlags:
    """The two flags that make a job's `Speculation`, as the user writes them."""

    speculative_config: Annotated[
        str,
        Flag(
            f"Choose how tokens are guessed ahead: {', '.join(METHODS)}, or a JSON object with any of "
            f"{', '.join(_KINDS)}. The answers stay the same.",
            "Engine",
            "JSON|METHOD",
            table=True,
        ),
    ] = "auto"
    draft_model: Annotated[
        str | None,
        Flag("Let this smaller model guess tokens ahead; it must have the same tokenizer.", "Engine", names_model=True),
    ] = None


def speculation_of(text: str, draft_model: str | None) -> Speculation:
    """Parse the two flags: a JSON object or the name of a method, and a model, whose path is kept as the user gave it.

    Raises `UsageError`, naming the key, and for an unknown key the nearest known key.
    """
    values = _values(text)
    if draft_model is not None:
        if "model" in values:
            raise UsageError(f"--draft-model is {draft_model!r}, and {FLAG} names a model too; leave one of them out")
        values["model"] = draft_model
    for key, value in values.items():
        _check(key, value)
    method, model = values.get("method", "auto"), values.get("model")
    if model is not None:
        if method not in ("auto", "draft_model"):
            raise UsageError(f"{FLAG}: method {method!r} has no use for the model {model!r}; leave one of them out")
        values["model"] = Path(model)
    try:
        return Speculation(**values)
    except ValueError as error:
        raise UsageError(f"{FLAG}: {error}") from error


def _values(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"method": text.strip()}
    try:
        return json.loads(text, object_pairs_hook=_once)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{FLAG} is not a JSON object: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it has a key twice")
    return values


def _check(key: str, value: Any) -> None:
    if key not in _KINDS:
        near = _KEYS_ELSEWHERE.get(key) or difflib.get_close_matches(key, _KINDS, n=1, cutoff=0.0)[0]
        raise UsageError(f"{FLAG} has an unknown key {key!r}; the nearest known key is {near!r}")
    kind, name = _KINDS[key]
    if type(value) is not kind:
        raise UsageError(f"{FLAG}: {key} is {str(value)[:50]!r}; it must be {name}")
    if key == "method" and value in _METHODS_ELSEWHERE:
        raise UsageError(f"{FLAG}: method is {value!r}; batchinfer calls it {_METHODS_ELSEWHERE[value]!r}")
    if key == "model" and (not value or "\0" in str(value)):
        raise UsageError(f"{FLAG}: model is {value!r}; name a directory, a GGUF file or a model on the Hub")
