"""`GenerationConfig`: which settings of a checkpoint's generation_config.json a job takes over, and which not, and why.

Settings that change the logits belong to the checkpoint, which was published with them: they apply unless they are
switched off. Drawing at random is the user's choice: its settings apply only if they are asked for.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.host.files import read_object

FILE = "generation_config.json"
FLAG = "--generation-config"
CHOICES = ("auto", "sampling", "none")

# Keys of the file -> fields of `SamplingParams`.
OF_LOGITS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "min_new_tokens": "min_tokens",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
}
OF_DRAWING = {key: key for key in ("temperature", "top_k", "top_p", "min_p")}

# Keys that change what transformers generates and are not taken over -> a value at which they change nothing.
NOT_HERE: dict[str, Any] = {
    "max_new_tokens": None,
    "stop_strings": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
    "watermarking_config": None,
}
OTHERWISE = {"max_new_tokens": "give --max-tokens", "stop_strings": "give --stop"}
MOST_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Settings:
    """The settings that were found, by their keys in the file, as JSON has them."""

    applied: dict[str, Any] = field(default_factory=dict)
    not_applied: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the reason

    def lines(self) -> list[str]:
        """Return lines for the log and the report; none if there is nothing to tell."""
        applied = [f"{FILE}: {_listed(self.applied)} applied"] if self.applied else []
        return applied + [f"{FILE}: {_listed(keys)} not applied: {why}" for why, keys in self.not_applied.items()]


@dataclass(frozen=True)
class GenerationConfig:
    """The settings in a checkpoint's file, and which of them to take over: one of `CHOICES`."""

    path: Path
    choice: str
    values: dict[str, Any]

    @classmethod
    def read(cls, model: Path, choice: str) -> "GenerationConfig":
        """Read the file in a checkpoint's folder, if there is one. Raises `ValueError` naming a file that is no JSON
        object."""
        path = model / FILE
        values = read_object(path) if path.is_file() else {}
        if values.get("do_sample") is True:
            values = {"temperature": 1.0, **{key: value for key, value in values.items() if value is not None}}
        return cls(path, choice, values)

    def applied_to(self, params: SamplingParams, given: Collection[str]) -> tuple[SamplingParams, Settings]:
        """Return `params` with the checkpoint's settings, except in the fields in `given`, and what became of each.

        Raises `ValueError` naming a setting whose value is not allowed.
        """
        found, default = Settings(), SamplingParams()
        for key, name in (OF_LOGITS | OF_DRAWING).items():
            value = self._checked(name, key)
            if value in (getattr(default, name), []):
                continue
            why = self._why_not(key, name, given)
            if why is None:
                params = replace(params, **{name: value})
                found.applied[key] = self.values[key]
            else:
                found.not_applied.setdefault(why, {})[key] = self.values[key]
        for key, neutral in NOT_HERE.items():
            value = self.values.get(key)
            if value not in (None, neutral, [], {}):
                found.not_applied.setdefault(OTHERWISE.get(key, "there is no such setting here"), {})[key] = value
        return params, found

    def _checked(self, name: str, key: str) -> Any:
        """Return the value for a field; its default if the file has none. One that is not used is not checked."""
        value = self.values.get(key)
        if value is None:
            return getattr(SamplingParams(), name)
        if self.choice == "none" or (key in OF_DRAWING and self.choice != "sampling"):
            return value
        try:
            return getattr(SamplingParams(**{name: value}), name)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: {key} does not fit: {error}; correct the file, or leave it out with {FLAG} none"
            ) from error

    def _why_not(self, key: str, name: str, given: Collection[str]) -> str | None:
        if self.choice == "none":
            return f"{FLAG} is none"
        if name in given:
            return f"--{name.replace('_', '-')} is given"
        if key in OF_DRAWING and self.choice != "sampling":
            return f"{FLAG} sampling applies it"
        if key in OF_DRAWING and self.values.get("do_sample") is False:
            return "do_sample is false"
        return None


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    """Write a value, and of a long list its beginning."""
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
