"""Answer keys: a digest of all that a row's answer depends on besides the job, by which a later job finds it again."""

import hashlib
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.request import Choices, Requests
from batchinfer.jobs.results.schema import KEY

Keys = NDArray[np.bytes_]  # [n] digests


def answer_keys(requests: Requests) -> Keys:
    """Return a digest for each row [n]: of its token ids, its params, its labels and, where tokens are drawn, its
    seed."""
    size = KEY.type.byte_width
    starts = [repr(params).encode() for params in requests.params]
    sampled = [params.temperature > 0 for params in requests.params]
    raw, bounds = requests.token_ids.astype("<i4").tobytes(), (4 * requests.offsets).tolist()
    choices = requests.choices
    labels = [b""] * len(requests) if choices is None else [_joined(choices, i) for i in range(len(requests))]
    rows = zip(requests.param_index.tolist(), requests.seeds.tolist(), labels, pairwise(bounds), strict=True)
    digests = (
        hashlib.blake2b(
            starts[i] + row_labels + b"%d" % (seed if sampled[i] else 0) + b"/" + raw[a:b], digest_size=size
        ).digest()
        for i, seed, row_labels, (a, b) in rows
    )
    return np.fromiter(digests, f"S{size}", len(requests))


def _joined(choices: Choices, i: int) -> bytes:
    """Return the labels of row i as bytes; no label holds a NUL character."""
    return "\0".join([*choices.texts_of(i), ""]).encode()
