"""Parts and their merge, against what was put in."""

import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.jobs import parts
from batchinfer.jobs.parts import PART_SCHEMA, RESULT_FIELDS, RunFolder
from batchinfer.jobs.spec import Refused

INPUT_SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float64())])


def new_folder(path: Path) -> RunFolder:
    folder = RunFolder(path / "out.parquet")
    folder.create({"command": "test"}, {"input": "abc"})
    return folder


def finished(rows: list[int], text: str = "answer") -> pa.RecordBatch:
    n = len(rows)
    columns = [
        pa.array(rows, pa.int64()),
        pa.array([f"{text} {row}" for row in rows]),
        pa.array(["stop" if row % 2 else "length" for row in rows]),
        pa.array([row + 1 for row in rows], pa.int32()),
        pa.array([3] * n, pa.int32()),
        pa.nulls(n, pa.string()),
        pa.nulls(n, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PART_SCHEMA)


def inputs(n: int, rows: int) -> list[tuple[int, pa.RecordBatch]]:
    table = pa.table({"id": [f"#{i}" for i in range(n)], "score": np.arange(n) / 2}, schema=INPUT_SCHEMA)
    return [(first, table.slice(first, rows).combine_chunks().to_batches()[0]) for first in range(0, n, rows)]


def cut(rows: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(c % (len(rows) + 1) for c in cuts), len(rows)]
    return [rows[a:b] for a, b in pairwise(bounds) if a < b]


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    batch_rows=st.integers(1, 64),
    group_bytes=st.sampled_from([1, 2000, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_merge_gives_all_rows_in_input_order(
    tmp_path_factory: pytest.TempPathFactory, n: int, cuts: list[int], batch_rows: int, group_bytes: int, seed: int
) -> None:
    folder = new_folder(tmp_path_factory.mktemp("run"))
    order = list(range(n))
    random.Random(seed).shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROW_GROUP_BYTES", group_bytes)
        patch.setattr(parts, "OUTPUT_GROUP_BYTES", 4000)
        for rows in cut(order, cuts):
            folder.commit([finished(rows)])
        merged = folder.merge(INPUT_SCHEMA, inputs(n, batch_rows))
    table = pq.read_table(merged, page_checksum_verification=True)
    assert table.schema.names == ["id", "score", *(field.name for field in RESULT_FIELDS)]
    assert table["id"].to_pylist() == [f"#{i}" for i in range(n)]
    assert table["generated_text"].to_pylist() == [f"answer {i}" for i in range(n)]
    assert table["prompt_tokens"].to_pylist() == list(range(1, n + 1))


def test_a_part_is_sorted_and_carries_the_fingerprints(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([5, 3]), finished([4])])
    table = pq.read_table(folder.path / "parts" / "part-000001.parquet")
    assert table["row"].to_pylist() == [3, 4, 5]
    assert json.loads(table.schema.metadata[b"batchinfer"]) == {"input": "abc"}


def test_the_manifest_describes_the_files(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([2, 0])])
    folder.commit([finished([1])])
    folder.write_manifest()
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["rows"] == 3
    assert [part["finish_reasons"] for part in manifest["parts"]] == [{"length": 2}, {"stop": 1}]
    for part in manifest["parts"]:
        data = (folder.path / "parts" / part["name"]).read_bytes()
        assert (part["sha256"], part["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0])])
    folder.publish(folder.merge(INPUT_SCHEMA, inputs(1, 1)))
    assert sorted(path.name for path in folder.path.iterdir()) == ["parts", "run.json"]
    assert folder.output.exists()


def test_a_table_without_rows(tmp_path: Path) -> None:
    table = pq.read_table(new_folder(tmp_path).merge(INPUT_SCHEMA, []))
    assert (table.num_rows, table.num_columns) == (0, 2 + len(RESULT_FIELDS))


@pytest.mark.parametrize(
    ("committed", "n"), [([0, 1], 3), ([0, 1, 2, 3], 3), ([0, 2], 3), ([0, 1, 1, 2], 3), ([0, 1, 2, 3, 4], 3)]
)
def test_an_input_that_changed_is_refused(tmp_path: Path, committed: list[int], n: int) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished(committed)])
    with pytest.raises(Refused, match="the input changed"):
        folder.merge(INPUT_SCHEMA, inputs(n, 2))


def test_a_second_writer_is_refused_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    late = RunFolder(folder.output)
    folder.commit([finished([0], "first")])
    with pytest.raises(Refused, match="another run writes to the same output"):
        late.commit([finished([0], "second")])
    part = pq.read_table(folder.path / "parts" / "part-000001.parquet")
    assert part["generated_text"].to_pylist() == ["first 0"]


def test_a_flipped_bit_in_a_part_is_noticed(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished(list(range(1000)))])
    part = folder.path / "parts" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 4] ^= 1
    part.write_bytes(data)
    with pytest.raises(OSError, match=r"part-000001\.parquet is damaged"):
        folder.merge(INPUT_SCHEMA, inputs(1000, 100))


def test_a_failed_write_leaves_no_half_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_folder(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.commit([finished([0])])
    assert not list((folder.path / "parts").iterdir())
    assert not list((folder.path / "tmp").iterdir())
    folder.commit([finished([0])])
    assert folder.committed_rows == 1


def test_earlier_results_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.refuse_existing(overwrite=False)
    new_folder(tmp_path)
    with pytest.raises(Refused, match=r"out\.run holds an unfinished run; give --overwrite"):
        folder.refuse_existing(overwrite=False)
    folder.output.write_bytes(b"old")
    with pytest.raises(Refused, match=r"out\.parquet exists; .* --overwrite"):
        folder.refuse_existing(overwrite=False)
    folder.refuse_existing(overwrite=True)
    folder.create({}, {})
    assert not folder.output.exists()


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.path.mkdir()
    (folder.path / "thesis.tex").touch()
    with pytest.raises(Refused, match="holds files that no run wrote"):
        folder.refuse_existing(overwrite=True)


def test_a_file_or_directory_in_the_way_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.output.mkdir()
    with pytest.raises(Refused, match="is a directory"):
        folder.refuse_existing(overwrite=True)
    other = RunFolder(tmp_path / "other.parquet")
    other.path.touch()
    with pytest.raises(Refused, match=r"other\.run is a file"):
        other.refuse_existing(overwrite=True)


def test_many_parts_need_few_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = new_folder(tmp_path)
    n = 140
    for i in range(n):
        folder.commit([finished([i, n + i])])  # every part is open, so to speak, for most of the merge
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        merged = folder.merge(INPUT_SCHEMA, inputs(2 * n, 50))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pq.read_metadata(merged).num_rows == 2 * n
