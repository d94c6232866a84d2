"""Texts among sampling params in token ids: stop texts that are control tokens, and bad words."""

from dataclasses import replace

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer


def in_token_ids(params: SamplingParams, tokenizer: Tokenizer) -> tuple[SamplingParams, list[str]]:
    """Return params with the ids of control tokens among the stop texts and of bad words; lines for log and report.

    Answers are printed without control tokens, so that a stop text never finds one in them.
    """
    if not params.stop and not params.bad_words:
        return params, []
    lines, ids = [], list(params.stop_token_ids)
    for text in params.stop:
        hidden = tokenizer.unprinted_in(text)
        if text in hidden:
            ids.append(hidden[text])
            lines.append(f"stop {text!r} is a control token: answers end at its id {hidden[text]}")
        elif hidden:
            token, number = next(iter(hidden.items()))
            lines.append(
                f"stop {text!r} never matches, because answers are printed without the control token {token!r} in it; "
                f"give that token alone, or --stop-token-ids {number}"
            )
    words = [*params.bad_words_ids, *tokenizer.words(params.bad_words)]
    return replace(params, stop_token_ids=tuple(dict.fromkeys(ids)), bad_words_ids=tuple(dict.fromkeys(words))), lines


def refuse_unknown_ids(params: SamplingParams, vocabulary: int) -> None:
    """Raise `ValueError` naming a token id that a model with this vocabulary lacks."""
    for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
        for token in getattr(params, name):
            if token >= vocabulary:
                raise ValueError(f"{name} is {token}; it must be at most {vocabulary - 1} for this model")
