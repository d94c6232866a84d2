"""Shards of a job: each row is in one of them, and together they are what one run gives."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, expected, prompts, spec, write

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.flag_values import shard_of
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.tables.table import Table
from batchinfer.jobs.verify import verify

N = 100


def run_shards(folder: Path, model: Path, count: int, only: list[int] | None = None, **fields: Any) -> list[Path]:
    outputs = []
    for i in range(count) if only is None else only:
        output = sharded(folder / "out.parquet", i, count)
        run(spec(model, folder / "in.parquet", output=output, shard=(i, count), **fields), STUB)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("count", [1, 3, 7, 150])
def test_the_shards_of_a_table_are_its_rows(tmp_path: Path, count: int) -> None:
    files = [write(tmp_path / f"{i}.parquet", prompt=prompts(n)) for i, n in enumerate((40, 1, 59))]
    table = Table.open(files)
    whole = [text for _, batch in table.batches(None, 16) for text in batch["prompt"].to_pylist()]
    found = []
    for i in range(count):
        shard = table.shard(i, count)
        batches = list(shard.batches(["prompt"], 16))
        assert [first for first, _ in batches] == [0, *(a[0] + len(a[1]) for a, _ in pairwise(batches))][: len(batches)]
        assert sum(len(batch) for _, batch in batches) == shard.num_rows
        found += [text for _, batch in batches for text in batch["prompt"].to_pylist()]
    assert found == whole


def test_values_that_are_no_text_are_where_they_were(tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"prompt": text if i != 61 else 7}) for i, text in enumerate(prompts(N))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = sharded(tmp_path / "out.parquet", 1, 2)
    report = run(spec(model, tmp_path / "in.jsonl", output=output, shard=(1, 2)), STUB)
    assert report.rows_by_error == {"wrong_type": 1}
    assert pq.read_table(output)["error_code"].to_pylist().index("wrong_type") == 11


def test_shards_together_are_one_run(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in.parquet", prompt=prompts(N), id=pa.array(range(N)))
    outputs = run_shards(tmp_path, model, 3)
    assert [output.name for output in outputs] == [f"out-{i}-of-3.parquet" for i in range(3)]
    assert merge_shards(outputs[::-1], tmp_path / "all.parquet", overwrite=False) == N
    merged = pq.read_table(tmp_path / "all.parquet")
    run(spec(model, tmp_path / "in.parquet"), STUB)
    assert merged.equals(pq.read_table(tmp_path / "out.parquet"))
    assert merged["generated_text"].to_pylist() == expected(model, prompts(N))
    with pytest.raises(Refused, match="exists; choose another one, or give --overwrite"):
        merge_shards(outputs, tmp_path / "all.parquet", overwrite=False)


def test_shards_on_both_sides_of_few_rows_go_together(tmp_path: Path, model: Path) -> None:
    """Merge shards of 4 and of 5 rows: 4-bit weights would be multiplied in two ways, had each shard the choice."""
    write(tmp_path / "in.parquet", prompt=prompts(9))
    merge_shards(run_shards(tmp_path, model, 2), tmp_path / "all.parquet", overwrite=False)
    assert pq.read_table(tmp_path / "all.parquet")["generated_text"].to_pylist() == expected(model, prompts(9))


def test_holes_overlaps_and_strangers_are_named(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in.parquet", prompt=prompts(N))
    outputs = run_shards(tmp_path, model, 4)
    for shards, message in (
        (outputs[1:3], "without shards 0, 3 of 4, counted from 0"),
        (outputs[:3], "without shard 3 of 4, counted from 0"),
        ([*outputs, outputs[2]], "shard 2 of 4 is given twice"),
        ([*outputs[:3], tmp_path / "no.parquet"], r"no\.parquet is not the output of a run"),
    ):
        with pytest.raises(Refused, match=message):
            merge_shards(shards, tmp_path / "all.parquet", overwrite=False)
    others = run_shards(tmp_path, model, 4, [3], seed=5, overwrite=True)
    with pytest.raises(Refused, match=r"belongs to another job than .*: it has another sampling"):
        merge_shards(outputs[:3] + others, tmp_path / "all.parquet", overwrite=False)
    assert not (tmp_path / "all.parquet").exists()


def test_merged_shards_are_verified_by_their_hash(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in.parquet", prompt=prompts(N))
    outputs = run_shards(tmp_path, model, 2)
    merge_shards(outputs, tmp_path / "all.parquet", overwrite=False)
    counts, verified = verify(tmp_path / "all.parquet")
    assert (
        counts.startswith(f"{tmp_path / 'all.parquet'}: {N:,} rows (")
        and " 0 " not in counts
        and "merged of 2 shards" in verified
    )
    pq.write_table(pq.read_table(tmp_path / "all.parquet").slice(1), tmp_path / "all.parquet")
    with pytest.raises(Refused, match=r"was changed: its sha256 is not the one in .*; merge the shards again"):
        verify(tmp_path / "all.parquet")
    (tmp_path / "all.run" / "report.json").unlink()
    with pytest.raises(Refused, match="of shards that were merged without a report, verify each"):
        verify(tmp_path / "all.parquet")
    assert all(verify(output) for output in outputs)


def test_a_shard_that_is_damaged_or_unfinished_is_refused(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in.parquet", prompt=prompts(N))
    outputs = run_shards(tmp_path, model, 2)
    data = bytearray(outputs[1].read_bytes())
    data[len(data) // 2] ^= 1
    outputs[1].write_bytes(data)
    with pytest.raises(Refused, match=r"out-1-of-2\.parquet was changed: its sha256"):
        merge_shards(outputs, tmp_path / "all.parquet", overwrite=False)
    outputs[1].unlink()
    with pytest.raises(Refused, match=r"out-1-of-2\.parquet does not exist"):
        merge_shards(outputs, tmp_path / "all.parquet", overwrite=False)


def test_another_shard_never_goes_on_with_this_one(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in.parquet", prompt=prompts(N))
    output = run_shards(tmp_path, model, 3, [1])[0]
    with pytest.raises(Refused, match="begun with another shard;"):
        run(spec(model, tmp_path / "in.parquet", output=output, shard=(2, 3)), STUB)


@pytest.mark.parametrize("text", ["", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard is "):
        shard_of("--shard", text)


def test_shards_are_counted_from_0(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="--shard is 3/3; shards are counted from 0: give one from 0/3 to 2/3"):
        spec(model, tmp_path / "in.parquet", shard=(3, 3))


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("batchinfer")
    wrong = subprocess.run(
        [program, "merge", "a.parquet", "-o", tmp_path / "o.parquet"], capture_output=True, text=True
    )
    assert wrong.returncode == 65 and "a.parquet is not the output of a run" in wrong.stderr
