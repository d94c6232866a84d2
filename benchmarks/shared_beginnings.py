"""How much of what neighbouring prompts have in common is computed once, by the grain of sharing.

    python benchmarks/shared_beginnings.py

Counts, as `batchinfer plan` does, over tables of random tokens: 600 rows behind 20 descriptions of 60 to 180 tokens,
and 600 rows behind one system prompt of 40. Nothing is timed.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conditions import conditions

from batchinfer.engine.prefix_tree import likeness
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.run_order import depth_first
from batchinfer.jobs.rows.token_file import StoredRequests

TABLES = {"20 descriptions of 60 to 180 tokens": (20, 60, 180), "a system prompt of 40 tokens": (1, 40, 41)}
ROWS, GRAINS = 600, (64, 32, 16)


def main() -> None:
    """Print a line for each table."""
    print(
        f"| {ROWS} rows behind | tokens in common | " + " | ".join(f"shared, grain {grain}" for grain in GRAINS) + " |"
    )
    print("|---|---:|" + "---:|" * len(GRAINS))
    for name, table in TABLES.items():
        requests = prompts(*table)
        shares = []
        for grain in GRAINS:
            stored = StoredRequests.of(requests)
            order = depth_first(stored, np.arange(ROWS), grain)
            shares.append(LengthFigures.of(stored, order, 16, grain).shared_tokens)
            common = int(likeness(requests.take(order), 1).tiles.sum())
        told = " | ".join(f"{shared:,} ({100 * shared / common:.0f} %)" for shared in shares)
        print(f"| {name} | {common:,} | {told} |")
    print(f"\n{conditions()['commit']}")


def prompts(beginnings: int, least: int, most: int) -> Requests:
    """Make prompts of random tokens behind beginnings of these lengths, and 10 to 80 tokens of each row's own."""
    rng = np.random.default_rng(0)
    heads = [rng.integers(0, 32_000, rng.integers(least, most)).tolist() for _ in range(beginnings)]
    rows = [heads[i % beginnings] + rng.integers(0, 32_000, rng.integers(10, 80)).tolist() for i in range(ROWS)]
    return Requests.of(rows, SamplingParams())


if __name__ == "__main__":
    main()
