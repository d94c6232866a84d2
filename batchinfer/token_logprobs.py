"""`TokenLogprob`: the log-probability of a token as `LLM` returns it, and the figures of a scored text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchinfer.engine.request import RowError, TokenScores
from batchinfer.text.token_texts import TokenTexts


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token in its place: the model's own, before anything changes it."""

    token: str  # U+FFFD for bytes that make no whole character
    token_id: int
    logprob: float
    top: Sequence["TokenLogprob"] = ()  # the likeliest tokens in its place, the likeliest first


@dataclass(frozen=True)
class Score:
    """How likely a completion is behind a prompt."""

    index: int  # index of the prompt in the list, from 0
    tokens: Sequence[TokenLogprob]  # of the completion; empty where there is an error
    prompt_tokens: int  # 0 where the prompt was not run
    error: RowError | None = None  # a code in snake_case, and a message

    @property
    def log_probability(self) -> float:
        """The sum over the completion's tokens; 0 where there is an error."""
        return float(np.sum([token.logprob for token in self.tokens]))

    @property
    def greedy(self) -> bool:
        """True if each token is the likeliest in its place, or as likely as that one."""
        return all(token.logprob >= token.top[0].logprob for token in self.tokens)


def token_logprobs(scores: TokenScores, i: int, texts: TokenTexts) -> list[TokenLogprob]:
    """Return the log-probabilities of row i's tokens."""
    one = scores.take(np.array([i]))
    rows = zip(one.top_ids, one.top_values, strict=True)
    tops = [_listed(ids, values, texts) for ids, values in ((ids[ids >= 0], row[ids >= 0]) for ids, row in rows)]
    plain = _listed(one.token_ids, one.values, texts)
    return [TokenLogprob(p.token, p.token_id, p.logprob, tuple(top)) for p, top in zip(plain, tops, strict=True)]


def _listed(ids: np.ndarray, values: np.ndarray, texts: TokenTexts) -> list[TokenLogprob]:
    return [TokenLogprob(*each) for each in zip(texts.of(ids), ids.tolist(), values.tolist(), strict=True)]
