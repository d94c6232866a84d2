"""How long a plan takes, and how much memory: a million prompts, many with a template in front, some twice.

    python benchmarks/plan_speed.py [--rows N] [--output-json FILE]

Lengths are lognormal around 200 tokens; 60 % of the rows begin with one of 100 templates of 120 tokens, and 5 % are
copies of another row. No tokenizer runs: rows are token ids. Prints the seconds for reading them into the token file,
those for the plan after that, and the peak of resident memory, of which pages of the mapped file are a part; writes
`benchmarks/results/plan_speed.json`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conditions import conditions
from numpy.typing import NDArray

from batchinfer.host.memory import peak_memory_bytes
from batchinfer.jobs.bench import TOKEN_IDS, TokenIdPrompts
from batchinfer.jobs.rows.windows import Windows
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.text.tokenizer import Tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "plan_speed.json"
GROUP_ROWS = 50_000
VOCABULARY = 128_000
TEMPLATES, TEMPLATE_TOKENS, TEMPLATED = 100, 120, 0.6
COPIES = 0.05
MEAN, DEVIATION, LONGEST = 200, 100, 2000
BLOCK_SIZE = 32


def write_prompts(path: Path, rows: int) -> None:
    """The table, group by group; a copy is of a row in its group."""
    rng = np.random.default_rng(0)
    templates = rng.integers(0, VOCABULARY, (TEMPLATES, TEMPLATE_TOKENS), np.int32)
    with pq.ParquetWriter(path, pa.schema([(TOKEN_IDS, pa.list_(pa.int32()))])) as writer:
        for first in range(0, rows, GROUP_ROWS):
            prompts = group(rng, templates, min(GROUP_ROWS, rows - first))
            writer.write_table(pa.table({TOKEN_IDS: prompts}))


def group(rng: np.random.Generator, templates: NDArray[np.int32], rows: int) -> pa.ListArray:
    """Some rows of the table."""
    variance = np.log(1 + (DEVIATION / MEAN) ** 2)
    drawn = rng.lognormal(np.log(MEAN) - variance / 2, np.sqrt(variance), rows)
    lengths = np.clip(drawn, 1, LONGEST).astype(np.int32)
    templated = rng.random(rows) < TEMPLATED
    lengths[templated] = np.maximum(lengths[templated], TEMPLATE_TOKENS + 1)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)))
    token_ids = rng.integers(0, VOCABULARY, int(offsets[-1]), np.int32)
    front = offsets[:-1][templated][:, None] + np.arange(TEMPLATE_TOKENS)
    token_ids[front] = templates[rng.integers(0, TEMPLATES, len(front))]
    prompts = pa.ListArray.from_arrays(pa.array(offsets), pa.array(token_ids))
    places = np.arange(rows)
    copies = rng.choice(rows, int(COPIES * rows), replace=False)
    originals = np.setdiff1d(places, copies)
    places[copies] = rng.choice(originals, len(copies))
    return prompts.take(pa.array(places))


def main() -> None:
    """Write the table, plan it, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output-json", type=Path, default=RESULTS)
    args = parser.parse_args()
    ran = conditions()
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        path = Path(name) / "in.parquet"
        write_prompts(path, args.rows)
        before = peak_memory_bytes()
        spec = JobSpec(inputs=(path,), output=Path(name) / "out.parquet", model="none", prompt_column=TOKEN_IDS)
        table = Table.open((path,))
        prompts = TokenIdPrompts(spec, Tokenizer.__new__(Tokenizer), LONGEST + 1, table.schema)
        windows = Windows(table, prompts, BLOCK_SIZE, np.zeros(args.rows, np.bool_), Path(name))
        started = time.monotonic()
        while windows.rows_read < args.rows:
            windows.read()
        written = time.monotonic()
        while windows.reading:
            windows.read()
        planned = time.monotonic()
    lengths = windows.figures
    figures = {
        "rows": lengths.rows,
        "prompt_tokens": lengths.prompt_tokens,
        "duplicates": lengths.duplicates,
        "shared_tokens": lengths.shared_tokens,
        "groups": lengths.groups,
        "grouped_rows": lengths.grouped_rows,
        "write_seconds": round(written - started, 2),
        "plan_seconds": round(planned - written, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_bytes_before": before,
    }
    print(*(f"{name:<26}{value:,}" for name, value in figures.items()), sep="\n")
    args.output_json.write_text(json.dumps({**ran, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
