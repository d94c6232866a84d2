"""How long it takes to find the order of a template's fields, and how good the order of many fields is.

    python benchmarks/field_order.py > benchmarks/results/field_order.md

Reads a million rows with 8 columns from Parquet and finds the order of the 8, and of 6 of them, for two tables; seconds
are of one run, by the wall clock and of the processor. Then compares the order that is found for 7 and for 8 lines with
the best one, on small tables of random values.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conditions import conditions

from batchinfer.jobs.plan.field_order import Piece, best_order, distinct_rows, shared_lengths
from batchinfer.jobs.rows.field_values import BATCH_ROWS, FieldValues, read_field_values
from batchinfer.jobs.tables.table import Table

ROWS = 1_000_000
TABLES = {
    "2 to 1,000,000 values": (2, 5, 20, 300, 5_000, 50_000, 400_000, 1_000_000),
    "900 values each": (900,) * 8,
}
SMALL_TABLES = 100


def main() -> None:
    """Print both tables."""
    found = conditions()
    print("# The order of a template's fields\n")
    print(
        "Printed by `python benchmarks/field_order.py`. "
        f"{found['machine']}, {found['versions']}, numpy {np.__version__}, pyarrow {pa.__version__}, "
        f"{found['commit']}, {found['date']}.\n"
    )
    print(f"{ROWS:,} rows of 8 columns, texts of 5 to 60 bytes: seconds by the wall clock (of the processor).\n")
    print("| columns have | read the table alone | with codes of its values | order of 6 lines | order of 8 lines |")
    print("|---|---:|---:|---:|---:|")
    for name, counts in TABLES.items():
        print(f"| {name} | {' | '.join(seconds(counts))} |", flush=True)
    print("\nWhat rows share in the order that is found, as a share of what they do in the best one:\n")
    print("| lines | tables | least | mean |")
    print("|---:|---:|---:|---:|")
    for lines in (7, 8):
        shares = [ratio(np.random.default_rng(seed), lines) for seed in range(SMALL_TABLES)]
        print(f"| {lines} | {SMALL_TABLES} | {100 * min(shares):.1f} % | {100 * sum(shares) / len(shares):.2f} % |")


def seconds(counts: Sequence[int]) -> list[str]:
    """Return what reading takes, alone and with codes, and ordering 6 and 8 lines, for columns with so many values."""
    rng = np.random.default_rng(0)
    columns = {}
    for index, count in enumerate(counts):
        kinds = pa.array([f"{i} " + "x" * int(n) for i, n in enumerate(rng.integers(0, 50, count))])
        columns[f"c{index}"] = kinds.take(pa.array(rng.integers(0, count, ROWS)))
    with TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns), f"{folder}/in.parquet")
        table = Table.open([Path(folder) / "in.parquet"])
        taken = []
        clock = time.perf_counter(), time.process_time()
        for _ in table.batches(list(columns), BATCH_ROWS):
            pass
        taken.append(_since(clock))
        clock = time.perf_counter(), time.process_time()
        values = read_field_values(table, list(columns))
        taken.append(_since(clock))
        for fields in (6, 8):
            clock = time.perf_counter(), time.process_time()
            some = FieldValues(values.codes[:fields], values.lengths[:fields])
            best_order([[(5, index), (1, None)] for index in range(fields)], distinct_rows(some))
            taken.append(_since(clock))
    return taken


def _since(clock: tuple[float, float]) -> str:
    return f"{time.perf_counter() - clock[0]:.1f} ({time.process_time() - clock[1]:.1f})"


def ratio(rng: np.random.Generator, fields: int) -> float:
    """Return how good the order is for a table of 20 to 200 rows; half of its fields follow from another one."""
    rows = int(rng.integers(20, 200))
    codes = [rng.integers(0, rng.integers(1, 2 + rows // 2), rows) for _ in range(fields - fields // 2)]
    for source in rng.integers(0, len(codes), fields // 2):
        codes.append(rng.integers(0, rng.integers(1, rows // 2), rows)[codes[source]])
    lengths = [rng.integers(1, 40, rows)[some] for some in codes]
    values = distinct_rows(
        FieldValues([some.astype(np.int32) for some in codes], [n.astype(np.int32) for n in lengths])
    )
    lines: list[list[Piece]] = [[(int(rng.integers(0, 10)), index), (1, None)] for index in range(fields)]
    order, best = best_order(lines, values), best_order(lines, values, width=1 << fields)
    of_order, of_best = (
        int(shared_lengths([piece for line in lines_in for piece in lines[line]], values).sum())
        for lines_in in (order, best)
    )
    return of_order / of_best if of_best else 1.0


if __name__ == "__main__":
    main()
