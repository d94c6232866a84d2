"""Finding the order of a template's lines in which prompts have the longest beginnings in common.

Rows run in the order of their prompts' beginnings, so a prompt shares with another one, and computes once, the lines up
to the first in which no earlier row agrees. How many rows differ in a set of fields does not depend on the order of
these fields. So what a line adds follows from the set of lines before it alone, and the best order of a few lines is
found exactly, by dynamic programming over sets (Held and Karp 1962); of many lines, by a beam search over them.

GGR (Liu et al., "Optimizing LLM Queries in Relational Data Analytics Workloads", MLSys 2025) looks for an order of
fields of its own for each row, with values weighted by the squares of their lengths, and moves fields along on which
they depend functionally. Here all rows have one order: a template is an instruction to a model, whose answers should
not depend on which rows stand beside a row, and the planner sorts the rows anyway. A field that follows from fields
before it parts no rows, and so needs no rule.
Values that only begin alike count as different. What they have in common is shared when they run, in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from batchinfer.jobs.rows.field_values import MOST_ROWS, FieldValues, Numbers
from batchinfer.kernels.ragged import Ints

Piece = tuple[int, int | None]
"""Bytes of a text that all rows have, and the index of the field behind it; None if there is none."""

EXACT_LINES = 6  # of more lines only some sets are looked at: each further line would double them
SPLITS = 400  # of more lines: width times lines squared, twice the groups that are split
BITS = MOST_ROWS.bit_length() - 1


@dataclass(frozen=True, eq=False)
class Groups:
    """The rows that agree with another one in some fields, in groups that agree."""

    rows: Numbers  # [n] group after group, ascending within each
    group: Numbers  # [n] number of each row's group, ascending from 0

    @staticmethod
    def whole(rows: int) -> "Groups":
        """Return one group of all rows: before the first field they agree."""
        count = rows if rows > 1 else 0
        return Groups(np.arange(count, dtype=np.int32), np.zeros(count, np.int32))

    @property
    def later(self) -> Numbers:
        """The rows that are not the first of their group. They share what the group has in common."""
        later: Numbers = self.rows[1:][self.group[1:] == self.group[:-1]]
        return later

    def split(self, codes: Numbers) -> "Groups":
        """Return the groups that agree in one more field, which has these codes [all rows]."""
        if not len(self.rows):
            return self
        packed = self.group.astype(np.int64) << BITS
        packed |= codes[self.rows]
        packed <<= BITS
        packed |= self.rows
        packed.sort()
        same = np.concatenate(([False], np.diff(packed >> BITS) == 0, [False]))  # as the row before it
        kept = same[:-1] | same[1:]
        rows = (packed[kept] & (1 << BITS) - 1).astype(np.int32)
        return Groups(rows, np.cumsum(~same[:-1][kept], dtype=np.int32) - np.int32(1))


def shared_lengths(pieces: Sequence[Piece], values: FieldValues) -> Ints:
    """Return how many bytes of each row's prompt, which consists of these pieces, an earlier row begins with [rows]."""
    shared = np.zeros(values.rows, np.int64)
    groups = Groups.whole(values.rows)
    for length, index in pieces:
        shared[groups.later] += length
        if index is not None:
            groups = groups.split(values.codes[index])
            later = groups.later
            shared[later] += values.lengths[index][later]
    return shared


def distinct_rows(values: FieldValues) -> FieldValues:
    """Return the values of the rows without those that agree with an earlier row in all fields: they run once."""
    groups = Groups.whole(values.rows)
    for codes in values.codes:
        groups = groups.split(codes)
    return values.take(np.delete(np.arange(values.rows), groups.later))


@dataclass(frozen=True, eq=False)
class _Start:
    """The first lines of an order."""

    order: tuple[int, ...]
    gained: int  # bytes that rows share in these lines
    fields: int  # those in these lines and before them, as bits
    groups: Groups  # of the rows that agree in these fields


def best_order(
    lines: Sequence[Sequence[Piece]], values: FieldValues, before: Sequence[int] = (), width: int | None = None
) -> list[int]:
    """Return the order of lines, as indices, in which rows share most behind the fields `before` them.

    Orders grow line by line. Of those with the same lines the best one is kept: so the result is exact for up to
    `EXACT_LINES`, and of equally good orders it is the first one, which leaves lines where they are. Of more lines, the
    `width` sets are kept that would share most if no further line parted any rows, fewer the more lines there are.
    """
    width = width or max(1, SPLITS // max(len(lines), 1) ** 2)
    shares = _Shares(values)
    starts = [_Start((), 0, *shares.follow(0, Groups.whole(values.rows), before))]
    sizes = [shares.size(line) for line in lines]
    for _ in lines:
        found: dict[frozenset[int], _Start] = {}
        for start in starts:
            for index in (i for i in range(len(lines)) if i not in start.order):
                line, order = lines[index], (*start.order, index)
                other = found.get(frozenset(order))
                if other is None:
                    end = shares.follow(start.fields, start.groups, _new(line, start.fields))
                else:
                    end = other.fields, other.groups  # they do not depend on the order
                    shares.follow(start.fields, start.groups, _new(line, start.fields)[:-1])
                gained = start.gained + shares.gain(start.fields, line)
                if other is None or (gained, other.order) > (other.gained, order):
                    found[frozenset(order)] = _Start(order, gained, *end)
        starts = list(found.values())
        if len(lines) > EXACT_LINES:
            ranked = []
            for start in starts:
                left = sum(size for index, size in enumerate(sizes) if index not in start.order)
                hope = start.gained * values.rows + shares.rows[start.fields] * left
                ranked.append((-hope, start.order, start))
            starts = [start for _, _, start in sorted(ranked, key=lambda ranks: ranks[:2])[:width]]
    return list(starts[0].order)


@dataclass(eq=False)
class _Shares:
    """What rows share behind sets of fields, which are bits of an integer."""

    values: FieldValues
    rows: dict[int, int] = field(default_factory=dict)  # that agree with an earlier row in these fields
    lengths: dict[tuple[int, int], int] = field(default_factory=dict)  # bytes of one of the fields in these rows

    def follow(self, fields: int, groups: Groups, new: Sequence[int]) -> tuple[int, Groups]:
        """Note what is shared as `new` fields follow one after the other. Returns the last fields and groups."""
        self._note(fields, groups)
        for index in new:
            groups = groups.split(self.values.codes[index])
            fields |= 1 << index
            self._note(fields, groups)
        return fields, groups

    def gain(self, fields: int, line: Sequence[Piece]) -> int:
        """Return the shared bytes of a line behind these fields, which was measured."""
        total = 0
        for length, index in line:
            total += length * self.rows[fields]
            if index is not None:
                fields |= 1 << index
                total += self.lengths[fields, index]
        return total

    def size(self, line: Sequence[Piece]) -> int:
        """Return the bytes of a line in all rows."""
        of_fields = sum(int(self.values.lengths[index].sum()) for _, index in line if index is not None)
        return of_fields + self.values.rows * sum(length for length, _ in line)

    def _note(self, fields: int, groups: Groups) -> None:
        if fields in self.rows:
            return
        later = groups.later
        self.rows[fields] = len(later)
        for index, lengths in enumerate(self.values.lengths):
            if fields >> index & 1:
                self.lengths[fields, index] = int(lengths[later].sum())


def _new(line: Sequence[Piece], fields: int) -> list[int]:
    """Return the line's fields that are not among these, in its order."""
    return list(dict.fromkeys(index for _, index in line if index is not None and not fields >> index & 1))
