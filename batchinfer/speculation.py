"""`Speculation`: who drafts tokens, and how many; free of torch."""

from dataclasses import dataclass
from pathlib import Path

METHODS = ("off", "auto", "ngram", "suffix", "draft_model")
MOST_DRAFTS = 32


@dataclass(frozen=True)
class Speculation:
    """What `--speculative-config` says, with the names that other engines have for it.

    `ngram` looks for the newest tokens in the row itself, `suffix` also in what earlier rows of the job answered,
    `draft_model` asks a smaller model. `auto` takes of these what pays at each step. Whoever drafts, the output is the
    same. A `ValueError` names field, value and bound.
    """

    method: str = "auto"
    num_speculative_tokens: int = 8  # drafts of a row in one step, at most
    model: Path | None = None  # of the drafts; a local directory
    prompt_lookup_min: int = 2  # tokens that must agree before what followed them is drafted
    prompt_lookup_max: int = 5  # tokens that are compared; more of them are no better evidence
    gate: bool = True  # draft only where it is expected to pay, and as many as do; else always, and all

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        if not 1 <= self.num_speculative_tokens <= MOST_DRAFTS:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; it must be from 1 to {MOST_DRAFTS}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MOST_DRAFTS:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max {self.prompt_lookup_max}; they "
                f"must be from 1 to {MOST_DRAFTS}, the first not above the second"
            )
        if self.method == "draft_model" and self.model is None:
            raise ValueError("method is 'draft_model' and there is no model; name one")

    @property
    def looks_up(self) -> bool:
        """Whether drafts may be read from text that is there."""
        return self.method in ("auto", "ngram", "suffix")
