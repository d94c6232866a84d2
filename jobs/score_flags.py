"""The flags of `batchinfer score`, which reads texts and generates none; what it shares with `run` is in `flags.py`."""

from dataclasses import dataclass
from typing import Annotated

from batchinfer.flag import Flag


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """A user's choices for scoring texts."""

    completion_column: Annotated[
        str | None, Flag("Tell how likely each text in this column is behind the row's prompt.", "Scores", "COLUMN")
    ] = None
    text_column: Annotated[
        str | None, Flag("Tell how likely each text in this column is by itself: its perplexity.", "Scores", "COLUMN")
    ] = None
    token_log_probabilities: Annotated[bool, Flag("Write the log-probability of each token too.", "Scores")] = False

    @property
    def scores_texts(self) -> bool:
        """True if texts are scored, and nothing is generated."""
        return self.completion_column is not None or self.text_column is not None
