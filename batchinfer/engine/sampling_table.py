"""`SamplingTable`: the sampling params of many rows, their numbers as columns.

A million rows may each have params of their own. So what is a number is a field of a structured array, and the texts,
token ids and grammars, which few rows differ in, are objects that rows share. Free of torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.ragged import Ints

KINDS = {int: np.int32, float: np.float64, bool: np.bool_}
NUMBERS = np.dtype([(f.name, KINDS[type(f.default)]) for f in fields(SamplingParams) if type(f.default) in KINDS])
_numbers_of = attrgetter(*NUMBERS.names or ())
_texts_of = attrgetter(*(f.name for f in fields(SamplingParams) if f.name not in (NUMBERS.names or ())))
DEFAULTS = {name: getattr(SamplingParams(), name) for name in NUMBERS.fields or ()}
MOST_KEPT = 1024  # params that are remembered as objects


@dataclass(frozen=True, eq=False)
class SamplingTable(Sequence[SamplingParams]):
    """m params, alike or not: those at j have the numbers `numbers[j]`, and all else from `others[other_index[j]]`."""

    numbers: NDArray[Any]  # [m] of NUMBERS
    others: tuple[SamplingParams, ...]  # without repetitions, and with the default of each number
    other_index: NDArray[np.int32]  # [m] into others

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> "SamplingTable":
        """Make a table from params."""
        places: dict[tuple[Any, ...], int] = {}
        index = [places.setdefault(_texts_of(each), len(places)) for each in params]
        _, firsts = np.unique(np.array(index, np.int64), return_index=True)
        others = tuple(replace(params[i], **DEFAULTS) for i in firsts.tolist())
        return SamplingTable(np.array([*map(_numbers_of, params)], NUMBERS), others, np.array(index, np.int32))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, j: Any) -> Any:
        return _made(self.others[self.other_index[j]], self.numbers[j].item())

    def take(self, index: Ints) -> "SamplingTable":
        """Return the params at `index`, in that order, and no others."""
        used, other_index = np.unique(self.other_index[index], return_inverse=True)
        others = tuple(self.others[i] for i in used.tolist())
        return SamplingTable(self.numbers[index], others, other_index.astype(np.int32))

    def limited(self, most: Ints) -> "SamplingTable":
        """Return the params with `max_tokens` of at most `most` [m]."""
        numbers = self.numbers.copy()
        numbers["max_tokens"] = np.minimum(numbers["max_tokens"], most)
        return replace(self, numbers=numbers)

    def different(self) -> tuple["SamplingTable", NDArray[np.int32]]:
        """Return the params without repetitions, and where each is among them [m]."""
        keys = np.empty(len(self), np.dtype([("number", NUMBERS), ("other", np.int32)]))
        keys["number"], keys["other"] = self.numbers, self.other_index
        _, first, index = np.unique(keys.view(f"V{keys.itemsize}"), return_index=True, return_inverse=True)
        return self.take(first), index.astype(np.int32)

    @staticmethod
    def joined(tables: Sequence["SamplingTable"]) -> "SamplingTable":
        """Put the params of one table or more behind each other."""
        others: dict[SamplingParams, int] = {}
        index = []
        for table in tables:
            places = [others.setdefault(each, len(others)) for each in table.others]
            index.append(np.array(places, np.int32)[table.other_index])
        return SamplingTable(np.concatenate([t.numbers for t in tables]), tuple(others), np.concatenate(index))

    def described(self) -> list[bytes]:
        """Return the params as bytes [m]: what differs from the defaults, so that a field that is added later changes
        nothing."""
        texts = [_unusual((f.name, getattr(each, f.name), f.default) for f in fields(each)) for each in self.others]
        index, numbers = self.other_index.tolist(), self.numbers.tolist()
        return [
            (texts[i] + _unusual(zip(DEFAULTS, row, DEFAULTS.values(), strict=True))).encode()
            for i, row in zip(index, numbers, strict=True)
        ]


@lru_cache(MOST_KEPT)
def _made(other: SamplingParams, numbers: tuple[Any, ...]) -> SamplingParams:
    return replace(other, **dict(zip(DEFAULTS, numbers, strict=True)))


def _unusual(values: Iterable[tuple[str, Any, Any]]) -> str:
    return "".join(f"{name}={value!r};" for name, value, default in values if value != default)
