"""A job in shards, and a job that lost a part, come to the output of the whole job."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.spec import JobSpec, sharded


def assert_parts_make_the_whole(job: Callable[..., JobSpec], output: Path) -> None:
    """`job(**fields)` is a job with these fields changed; it has run, and its Parquet output is at `output`."""
    whole = pq.read_table(output).to_pylist()
    shards = [sharded(output, i, 2) for i in range(2)]
    for i in range(2):
        run(job(output=shards[i], shard=(i, 2)))
    merged = output.with_name("merged.parquet")
    merge_shards(shards, merged, overwrite=False)
    assert pq.read_table(merged).to_pylist() == whole

    parts = sorted(output.with_suffix(".run").joinpath("parts").iterdir())
    lost = pq.read_table(parts[-1])
    parts[-1].unlink()
    output.unlink()
    assert run(job()).rows_computed == len(lost) > 0
    assert pq.read_table(output).to_pylist() == whole
