"""`NewTokens`: the tokens that a step has added to its sequences."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.speculative import Drafts, verify
from batchinfer.models.batch import Batch


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of g sequences; the tokens themselves are in the sequence table."""

    places: Ints  # [g]
    counts: Ints  # [g] number of new tokens
    finite: NDArray[np.bool_]  # [g] whether the logits that they were sampled from were finite
    accepted: int = 0  # number of accepted drafts among them
    spoiled: Ints | None = None  # KV cache slots of drafts whose values are not finite
    # [g] the row of logits that each sequence's first new token was sampled from
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))


def verify_drafts(
    table: SequenceTable, batch: Batch, targets: Ints, finite: NDArray[np.bool_], eos_ids: Ints
) -> NewTokens:
    """Accept the drafts that equal the tokens the model samples at their positions; write these and one token more.

    `targets` [r] are the tokens that the model sampled in all rows, and `finite` [r] tells whether their logits were
    finite. A sequence whose drafts made values that are not finite gets no new token in this step, and no more drafts:
    attention gives later keys a weight of zero, but zero times infinity is not zero.
    """
    first = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
    offsets = np.append(first, len(batch.sequences))
    places = batch.sequences[first]
    drafts = np.diff(offsets) - 1
    found = verify(
        Drafts(
            offsets=torch.from_numpy(offsets),
            tokens=batch.tokens[batch.sampled[: len(batch.sequences)]],
            lengths=torch.from_numpy(table.length[places]),
            room=torch.from_numpy(table.end[places] - table.length[places]),
            ignore_eos=torch.from_numpy(table.ignore_eos[places]),
            eos_ids=torch.from_numpy(eos_ids),
            most=int(drafts.max()),
        ),
        torch.from_numpy(targets),
        torch.from_numpy(finite),
    )
    new = found.new_tokens.numpy()
    counts = (new >= 0).sum(1)
    all_finite = found.finite.numpy()
    again = ~all_finite & (drafts > 0)
    table.undrafted[places[again]] = True
    table.computed[places[again]] -= 1
    counts[again] = 0
    for place, tokens, count in zip(places.tolist(), new, counts.tolist(), strict=True):
        length = int(table.length[place])
        table.tokens[place, length : length + count] = tokens[:count]
    table.length[places] += counts
    drafted = drafts > 0
    table.computed[places[drafted & ~again]] = table.length[places[drafted & ~again]] - 1
    kept = ~again
    return NewTokens(
        places[kept],
        counts[kept],
        all_finite[kept],
        int(np.maximum(counts - 1, 0)[drafted].sum()),
        _spoiled_slots(table, batch, finite),
        first[kept],
    )


def _spoiled_slots(table: SequenceTable, batch: Batch, finite: NDArray[np.bool_]) -> Ints | None:
    """Return the KV cache slots of drafts that were not accepted, in sequences with values that are not finite."""
    places, positions = batch.queries.all_places, batch.queries.positions
    odd = np.isin(places, batch.sequences[~finite]) & (positions >= table.computed[places])
    return table.slots(places[odd], positions[odd]) if odd.any() else None
