"""The flags for sampling that are no field of `SamplingParams`."""

from dataclasses import dataclass
from typing import Annotated

from batchinfer.engine.generation_config import CHOICES
from batchinfer.flag import Flag

MAX_SAMPLES = 128  # of a row, which are in memory together


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """A user's choices for sampling."""

    sampling_params_column: Annotated[
        str | None,
        Flag(
            "Sample each row by the params in this column, which win over the flags: structs or JSON objects, as "
            '{"temperature": 0.7, "stop": ["END"], "n": 2, "seed": 1}.',
            "Sampling",
            "COLUMN",
        ),
    ] = None
    n: Annotated[
        int,
        Flag(
            "Generate N answers for every row; the first one is the same for any N.",
            "Sampling",
            at_least=1,
            at_most=MAX_SAMPLES,
        ),
    ] = 1
    generation_config: Annotated[
        str,
        Flag(
            "Take over from the checkpoint's generation_config.json what changes logits: penalties, bans and the least "
            "length. 'sampling' takes temperature, top-k, top-p and min-p too, 'none' nothing. A flag wins over the "
            "file.",
            "Sampling",
            "CHOICE",
            choices=CHOICES,
        ),
    ] = "auto"
    seed: Annotated[int, Flag("Derive the random seed of every row from this number.", "Sampling", at_least=0)] = 0
