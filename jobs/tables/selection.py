"""`Selection`: which rows of a table a job has, by --where, --sample and --limit, in this order."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.tables.table import Table
from batchinfer.jobs.tables.where import Condition

BATCH_ROWS = 8192
DRAWN_ROWS = 1 << 20  # row numbers that are drawn at a time


@dataclass(frozen=True)
class Selection:
    """A choice of rows: those that fulfil a condition, of these a random sample, and of the sample the first."""

    where: str | None
    sample: int | None  # number of rows
    limit: int | None
    seed: int  # of the sample

    @property
    def takes_all(self) -> bool:
        """True if it leaves no row out, whatever the table."""
        return (self.where, self.sample, self.limit) == (None, None, None)

    def note(self, table: Table) -> list[str]:
        """Say how many rows of the files are in a table that `of` has made; nothing if all are."""
        if table.chosen is None:
            return []
        given = {"--where": self.where, "--sample": self.sample, "--limit": self.limit}
        flags = ", ".join(flag for flag, value in given.items() if value is not None)
        none = "" if table.num_rows else ": the output has no rows"
        are = "is" if table.num_rows == 1 else "are"
        return [f"{table.num_rows:,} of {count_of(len(table.chosen), 'row')} {are} selected ({flags}){none}"]

    def of(self, table: Table) -> Table:
        """Return the table with the selected rows only; `table` has all rows of its files.

        Reads the columns of the condition once, and stops at the limit unless there is a sample. The result holds a bit
        for each row of the files, and choosing takes up to three bytes for each. Raises as `Condition.read` does, and
        `Refused` if a file is damaged or has changed.
        """
        if self.takes_all:
            return table
        chosen = np.ones(table.num_rows, np.bool_) if self.where is None else self._fulfilling(table, self.where)
        if self.sample is not None:
            chosen[chosen] = sample(int(chosen.sum()), self.sample, self.seed)
        if self.limit is not None:
            chosen[_end(chosen, self.limit) :] = False
        return table.only(pa.array(chosen))

    def _fulfilling(self, table: Table, where: str) -> NDArray[np.bool_]:
        condition = Condition.read(where, table.schema, table.paths[0])
        chosen = np.zeros(table.num_rows, np.bool_)
        enough = self.limit if self.sample is None else None
        found = end = 0
        for first, batch in table.batches(condition.columns, BATCH_ROWS):
            end = first + len(batch)
            if end > len(chosen):
                break
            holds = condition.holds(batch)
            chosen[first:end] = holds.to_numpy(zero_copy_only=False)
            found += holds.true_count
            if enough is not None and found >= enough:
                return chosen
        if end != len(chosen):
            raise Refused(f"{table.paths[0]}: the input changed while it was read; give the command again")
        return chosen


def digest(table: Table) -> str:
    """Return a sha256 over which rows of its files a table has; an empty text if it has all."""
    if table.chosen is None:
        return ""
    hashed = hashlib.sha256()
    for start in range(0, len(table.chosen), DRAWN_ROWS):
        hashed.update(np.packbits(table.chosen.slice(start, DRAWN_ROWS).to_numpy(zero_copy_only=False)).tobytes())
    return hashed.hexdigest()


def sample(rows: int, count: int, seed: int) -> NDArray[np.bool_]:
    """Return a random choice of `count` of `rows` rows, all if there are no more; each choice is equally likely.

    It follows from the three numbers alone, in every version of numpy: the streams of its bit generators are fixed.
    """
    few = min(count, rows - count)  # if more than half of the rows are wanted, those that are left out are drawn
    if few <= 0:
        return np.full(rows, count >= rows)
    drawn, stream = np.zeros(rows, np.bool_), np.random.PCG64(seed)
    while missing := few - int(drawn.sum()):  # some numbers are drawn twice, and never more than are missing
        # The remainder prefers some rows by at most one part in 2 ** 33, since a table has at most 2 ** 31 rows.
        drawn[stream.random_raw(min(missing, DRAWN_ROWS)) % np.uint64(rows)] = True
    return drawn if few == count else ~drawn


def _end(chosen: NDArray[np.bool_], limit: int) -> int:
    """Return the number of rows in which the first `limit` chosen ones are."""
    found = 0
    for start in range(0, len(chosen), DRAWN_ROWS):
        indices = np.flatnonzero(chosen[start : start + DRAWN_ROWS])
        if found + len(indices) >= limit:
            return start + int(indices[limit - found - 1]) + 1
        found += len(indices)
    return len(chosen)
