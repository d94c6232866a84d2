"""A checkpoint's settings are taken over where they should be, and the others are told."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from batchinfer.engine.generation_config import NOT_HERE, OF_DRAWING, OF_LOGITS, GenerationConfig, Settings
from batchinfer.engine.sampling_params import SamplingParams

# What transformers' file may also have: none of it changes which tokens an answer of one beam has.
WITHOUT_EFFECT = {
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "do_sample", "early_stopping", "eos_token_id", "is_assistant",
    "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_time",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "speculation_type", "target_lookbehind",
    "transformers_version", "use_cache", "use_mtp",
}  # fmt: skip


def applied(
    folder: Path, values: dict[str, Any], choice: str = "auto", given: tuple[str, ...] = (), **params: Any
) -> tuple[SamplingParams, Settings]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return GenerationConfig.read(folder, choice).applied_to(SamplingParams(**params), given)


def test_every_key_of_transformers_is_known() -> None:
    keys = {key for key in vars(transformers.GenerationConfig()) if not key.startswith("_")}
    known = {*OF_LOGITS, *OF_DRAWING, *NOT_HERE}
    assert keys - known == WITHOUT_EFFECT
    assert known - keys == {"presence_penalty", "frequency_penalty"}, "these are other engines' keys"


def test_transformers_defaults_are_not_worth_a_word(tmp_path: Path) -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    values = {key: value for key, value in defaults.items() if key not in OF_DRAWING}
    assert applied(tmp_path, values) == (SamplingParams(), Settings())
    (tmp_path / "generation_config.json").unlink()
    assert GenerationConfig.read(tmp_path, "auto").applied_to(SamplingParams(), ()) == (SamplingParams(), Settings())


FILE = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "min_new_tokens": 3,
    "suppress_tokens": [4, 5], "bad_words_ids": [[6, 7]], "num_beams": 4, "max_new_tokens": 100, "eos_token_id": 1,
}  # fmt: skip
LOGITS = {"repetition_penalty": 1.1, "min_tokens": 3, "suppress_tokens": [4, 5], "bad_words_ids": [[6, 7]]}
NEVER = {"give --max-tokens": {"max_new_tokens": 100}, "there is no such setting here": {"num_beams": 4}}


def test_what_changes_logits_is_taken_over(tmp_path: Path) -> None:
    params, settings = applied(tmp_path, FILE, max_tokens=9)
    assert params == SamplingParams(max_tokens=9, **LOGITS)
    assert set(settings.applied) == {"repetition_penalty", "min_new_tokens", "suppress_tokens", "bad_words_ids"}
    drawing = {"--generation-config sampling applies it": {"temperature": 0.6, "top_p": 0.9}}
    assert settings.not_applied == drawing | NEVER
    assert settings.lines()[:2] == [
        "generation_config.json: repetition_penalty 1.1, bad_words_ids [[6, 7]], min_new_tokens 3, "
        "suppress_tokens [4, 5] applied",
        "generation_config.json: temperature 0.6, top_p 0.9 not applied: --generation-config sampling applies it",
    ]


def test_sampling_takes_over_how_tokens_are_drawn(tmp_path: Path) -> None:
    params, settings = applied(tmp_path, FILE, "sampling")
    assert params == SamplingParams(temperature=0.6, top_p=0.9, **LOGITS) and settings.not_applied == NEVER
    assert applied(tmp_path, {"do_sample": True, "top_k": 7}, "sampling")[0] == SamplingParams(temperature=1.0, top_k=7)
    params, settings = applied(tmp_path, {"do_sample": False, "temperature": 0.6}, "sampling")
    assert params == SamplingParams() and settings.not_applied == {"do_sample is false": {"temperature": 0.6}}


def test_none_takes_over_nothing_and_says_so(tmp_path: Path) -> None:
    params, settings = applied(tmp_path, FILE, "none")
    assert params == SamplingParams() and not settings.applied
    left_out = settings.not_applied["--generation-config is none"]
    assert left_out == {key: FILE[key] for key in left_out} and len(left_out) == 6


def test_a_flag_wins(tmp_path: Path) -> None:
    given = ("repetition_penalty", "temperature")
    params, settings = applied(tmp_path, FILE, "sampling", given)
    assert (params.repetition_penalty, params.temperature, params.top_p) == (1.0, 0.0, 0.9)
    assert settings.not_applied["--repetition-penalty is given"] == {"repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": -1}, "repetition_penalty is -1; it must be above 0"),
        ({"repetition_penalty": "high"}, "repetition_penalty is 'high'; it must be a number"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ({"min_new_tokens": 1.5}, "min_tokens is 1.5; it must be a whole number"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5; it must be a list of token ids"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens is .*; it must be a list of token ids"),
        ({"bad_words_ids": [1]}, "bad_words_ids is 1; it must be a list of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty list"),
        ({"bad_words_ids": "word"}, "bad_words_ids is 'word'; it must be a list of lists"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; it must be from 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        applied(tmp_path, values)
    assert "generation_config.json" in str(refused.value) and "--generation-config none" in str(refused.value)
    assert applied(tmp_path, values, "none")[0] == SamplingParams()
