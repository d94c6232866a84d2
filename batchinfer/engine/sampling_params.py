"""`SamplingParams`: how tokens are sampled. Free of numpy, because the command line reads its flags from here."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated

from batchinfer.flag import Flag, problems

MAX_STOP_STRINGS = 64
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a row ends.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `stop` may be any collection of strings.
    Raises `ValueError` naming field, value and bound.
    """

    max_tokens: Annotated[
        int, Flag("End each answer after at most N tokens.", "Sampling", at_least=1, at_most=MAX_INT32)
    ] = 256
    temperature: Annotated[
        float,
        Flag("Draw tokens at this temperature; 0 takes the likeliest token.", "Sampling", at_least=0, at_most=100),
    ] = 0.0
    top_k: Annotated[
        int, Flag("Draw from the N likeliest tokens only.", "Sampling", at_least=0, at_most=MAX_INT32, off=0)
    ] = 0
    top_p: Annotated[
        float,
        Flag(
            "Draw from the fewest tokens whose probabilities add up to this share.",
            "Sampling",
            "SHARE",
            above=0,
            at_most=1,
            off=1,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        Flag(
            "Draw only from tokens with at least this share of the likeliest token's probability.",
            "Sampling",
            "SHARE",
            at_least=0,
            below=1,
            off=0,
        ),
    ] = 0.0
    stop: Annotated[
        tuple[str, ...],
        Flag("End an answer before this text; give the flag again for each further text.", "Sampling"),
    ] = ()
    ignore_eos: Annotated[
        bool, Flag("Continue an answer after the end-of-text token, up to --max-tokens.", "Sampling")
    ] = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k"):
            self._check_kind(name, Integral, "a whole number")
        for name in ("temperature", "top_p", "min_p"):
            self._check_kind(name, Real, "a number")
        if isinstance(self.stop, str):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of strings: one text goes in brackets")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of strings")
        for flag, problem in problems(self):
            raise ValueError(f"{flag.name} {problem}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop is {len(self.stop)} strings; it must be at most {MAX_STOP_STRINGS}")
        if not all(self.stop):
            raise ValueError("stop is an empty string; it must be strings of one character or more")

    def _check_kind(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
