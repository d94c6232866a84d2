"""The result columns of rows that choose from labels: the choice, its probability, and those of all labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.request import Scores
from batchinfer.jobs.label_flags import LabelFlags

CHOICE = [
    pa.field("choice", pa.string()),
    pa.field("choice_probability", pa.float64()),
    pa.field("choice_mass", pa.float64()),
]
PROBABILITIES = "choice_probabilities"


def label_fields(flags: LabelFlags) -> list[pa.Field]:
    """Return the columns that these flags ask for.

    `choice_mass` is the probability that the answer is any of the labels, and `choice_probability` the share that the
    choice has of it. With `choice_probabilities`, all labels' shares are a struct, or a list where rows have labels of
    their own.
    """
    if not flags.chooses:
        return []
    if not flags.choice_probabilities:
        return CHOICE
    if flags.choices:
        return [*CHOICE, pa.field(PROBABILITIES, pa.struct([pa.field(label, pa.float64()) for label in flags.choices]))]
    pair = pa.struct([pa.field("label", pa.string()), pa.field("probability", pa.float64())])
    return [*CHOICE, pa.field(PROBABILITIES, pa.list_(pair))]


def label_columns(fields: list[pa.Field], scores: Scores, labels: Sequence[Sequence[str]]) -> list[pa.Array]:
    """Return the columns `fields` of n rows from the log-probabilities of their labels; null for a row without any."""
    by_row = [_of_row(texts, scores.take(np.array([i])).values) for i, texts in enumerate(labels)]
    choices, shares, masses, all_shares = zip(*by_row, strict=True)
    columns = [pa.array(values, field.type) for values, field in zip((choices, shares, masses), fields, strict=False)]
    for field in fields[len(CHOICE) :]:
        values = all_shares if pa.types.is_struct(field.type) else [row and _pairs(row) for row in all_shares]
        columns.append(pa.array(values, field.type))
    return columns


def _of_row(
    texts: Sequence[str], scores: NDArray[np.float32]
) -> tuple[str | None, float | None, float | None, dict[str, float] | None]:
    """Return (choice, its share, mass, the share of each label)."""
    if not len(scores):
        return None, None, None, None
    exact = scores.astype(np.float64)
    mass = np.logaddexp.reduce(exact)
    shares = np.exp(exact - mass).tolist()
    best = int(exact.argmax())
    return texts[best], shares[best], float(np.exp(mass)), dict(zip(texts, shares, strict=True))


def _pairs(shares: dict[str, float]) -> list[dict[str, Any]]:
    return [{"label": label, "probability": share} for label, share in shares.items()]
