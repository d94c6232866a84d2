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
    n, size, hashed = len(requests), KEY.type.byte_width, hashlib.blake2b
    starts, choices = requests.params.described(), requests.choices
    begins = [starts[i] for i in requests.param_index.tolist()]
    if requests.samples is not None:
        begins = [b"%bn=%d;" % pair for pair in zip(begins, requests.samples.tolist(), strict=True)]
    if choices is not None:
        begins = [begin + _joined(choices, i) for i, begin in enumerate(begins)]
    seeds = np.where(requests.number("temperature") > 0, requests.seeds, np.uint64(0)).tolist()
    raw, bounds = requests.token_ids.astype("<i4").tobytes(), (4 * requests.offsets).tolist()
    digests = [
        hashed(b"%b%d/%b" % (begin, seed, raw[a:b]), digest_size=size).digest()
        for begin, seed, (a, b) in zip(begins, seeds, pairwise(bounds), strict=True)
    ]
    return np.frombuffer(b"".join(digests), f"S{size}", n)


def _joined(choices: Choices, i: int) -> bytes:
    """Return the labels of row i as bytes; no label holds a NUL character."""
    return "\0".join([*choices.texts_of(i), ""]).encode()
