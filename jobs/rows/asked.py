"""`Asked`: what the results of rows take from their requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.prompts import ends_of
from batchinfer.engine.request import Requests
from batchinfer.jobs.rows.answer_keys import Keys, answer_keys
from batchinfer.kernels.ragged import Ints
from batchinfer.text.stop import Stop


@dataclass(frozen=True, eq=False)
class Asked:
    """The columns of n rows."""

    prompt_tokens: NDArray[np.int32]  # [n]; of a scored text, those before it
    keys: Keys  # [n]
    ends: NDArray[np.int32] | None  # [n, END_TOKENS] last tokens of the prompts; None if no thinking is looked for
    labels: list[list[str]] | None  # [n] what each row chooses from; None if rows do not choose
    stops: list[Stop]  # [n] what its answers end at
    samples: NDArray[np.int32]  # [n] answers wanted
    parsed: list[tuple[str, ...] | None]  # [n] what is taken out of its answers, as `SamplingParams` has it
    scored_bytes: NDArray[np.int64] | None = None  # [n] size of each scored text; None if none is scored

    @staticmethod
    def of(requests: Requests, thinking: bool) -> "Asked":
        """Take them from requests; `thinking` says whether thinking is looked for in their answers."""
        n, choices = len(requests), requests.choices
        different = [Stop(params.stop, params.stop_token_ids) for params in requests.params.others]
        index = requests.params.other_index[requests.param_index]
        return Asked(
            (np.diff(requests.offsets) if requests.scored_from is None else requests.scored_from).astype(np.int32),
            answer_keys(requests),
            ends_of(requests, np.arange(n)) if thinking else None,
            None if choices is None else [choices.texts_of(i) for i in range(n)],
            [different[i] for i in index.tolist()],
            np.ones(n, np.int32) if requests.samples is None else requests.samples,
            [requests.params.others[i].parsed for i in index.tolist()],
            requests.scored_bytes,
        )

    @staticmethod
    def joined(parts: Sequence["Asked"]) -> "Asked":
        """Put the rows of all parts, one part or more of the same job, behind each other."""
        ends = [part.ends for part in parts if part.ends is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        sizes = [part.scored_bytes for part in parts if part.scored_bytes is not None]
        return Asked(
            np.concatenate([part.prompt_tokens for part in parts]),
            np.concatenate([part.keys for part in parts]),
            np.concatenate(ends) if ends else None,
            [texts for part in labels for texts in part] if labels else None,
            [stop for part in parts for stop in part.stops],
            np.concatenate([part.samples for part in parts]),
            [parsed for part in parts for parsed in part.parsed],
            np.concatenate(sizes) if sizes else None,
        )

    def take(self, index: Ints) -> "Asked":
        """Return the rows at `index`, in that order."""
        labels = None if self.labels is None else [self.labels[i] for i in index.tolist()]
        ends = None if self.ends is None else self.ends[index]
        stops, parsed = ([each[i] for i in index.tolist()] for each in (self.stops, self.parsed))
        sizes = None if self.scored_bytes is None else self.scored_bytes[index]
        return Asked(
            self.prompt_tokens[index], self.keys[index], ends, labels, stops, self.samples[index], parsed, sizes
        )
