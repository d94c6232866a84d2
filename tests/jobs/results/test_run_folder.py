"""Parts and their merge, against what was put in."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.results import durable, parquet, run_folder
from batchinfer.jobs.results.done import Done
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.results.schema import KEY, RESULT_FIELDS, part_schema

INPUT_SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float64())])


def new_folder(path: Path) -> RunFolder:
    folder = RunFolder(path / "out.parquet")
    open_folder(folder)
    return folder


def open_folder(folder: RunFolder, num_rows: int = 1000, **changes: Any) -> Done:
    settings = {"fingerprints": {"input": "abc"}, "overwrite": False, "retry_errors": False, **changes}
    return folder.open({"command": "test"}, num_rows=num_rows, **settings)


def finished(rows: list[int], text: str = "answer") -> pa.RecordBatch:
    n = len(rows)
    columns = [
        pa.array(rows, pa.int64()),
        pa.array([b"%016d" % row for row in rows], KEY.type),
        pa.array([f"{text} {row}" for row in rows]),
        pa.array(["stop" if row % 2 else "length" for row in rows]),
        pa.array([row + 1 for row in rows], pa.int32()),
        pa.array([3] * n, pa.int32()),
        pa.nulls(n, pa.string()),
        pa.nulls(n, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=part_schema())


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
        patch.setattr(run_folder, "ROW_GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "GROUP_BYTES", 4000)
        for rows in cut(order, cuts):
            folder.commit([finished(rows)])
        merged = folder.merge(INPUT_SCHEMA, inputs(n, batch_rows), n)
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
    folder.write_manifest(3)
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["rows"] == 3
    assert [part["finish_reasons"] for part in manifest["parts"]] == [{"length": 2}, {"stop": 1}]
    for part in manifest["parts"]:
        data = (folder.path / "parts" / part["name"]).read_bytes()
        assert (part["sha256"], part["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0])])
    folder.publish(folder.merge(INPUT_SCHEMA, inputs(1, 1), 1))
    assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "parts", "run.json", "tmp"]
    assert not list((folder.path / "tmp").iterdir())
    assert folder.output.exists()


def test_a_table_without_rows(tmp_path: Path) -> None:
    table = pq.read_table(new_folder(tmp_path).merge(INPUT_SCHEMA, [], 0))
    assert (table.num_rows, table.num_columns) == (0, 2 + len(RESULT_FIELDS))


@pytest.mark.parametrize(("committed", "n"), [([0, 1], 3), ([0, 1, 2, 3], 3), ([0, 2], 3), ([0, 1, 2, 3, 4], 3)])
def test_an_input_that_changed_is_refused(tmp_path: Path, committed: list[int], n: int) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished(committed)])
    with pytest.raises(Refused, match="the input changed"):
        folder.merge(INPUT_SCHEMA, inputs(n, 2), len(committed))


def test_a_second_writer_is_refused_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    late = second(folder)
    folder.commit([finished([0], "first")])
    with pytest.raises(Refused, match="another run writes to the same output"):
        late.commit([finished([0], "second")])
    part = pq.read_table(folder.path / "parts" / "part-000001.parquet")
    assert part["generated_text"].to_pylist() == ["first 0"]


def second(first: RunFolder) -> RunFolder:
    """Another run in the same folder, where locks do not work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "lock", lambda path: -1)
        late = RunFolder(first.output)
        open_folder(late)
    return late


def test_a_second_run_finds_the_folder_locked(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    with pytest.raises(Interrupted, match=r"another run is at work in .*out\.run; nothing was done"):
        open_folder(RunFolder(folder.output), overwrite=True)
    assert folder.path.exists()


def test_a_flipped_bit_in_a_part_is_noticed(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished(list(range(1000)))])
    part = folder.path / "parts" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    text = pq.read_metadata(part).row_group(0).column(part_schema().get_field_index("generated_text"))
    data[text.data_page_offset + text.total_compressed_size // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(OSError, match=r"part-000001\.parquet is damaged"):
        folder.merge(INPUT_SCHEMA, inputs(1000, 100), 1000)


def test_a_failed_write_leaves_no_half_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_folder(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.commit([finished([0])])
    assert not list((folder.path / "parts").iterdir())
    assert not list((folder.path / "tmp").iterdir())
    folder.commit([finished([0])])
    assert len(list((folder.path / "parts").iterdir())) == 1


def reopened(folder: RunFolder, **changes: Any) -> tuple[RunFolder, Done]:
    """The folder as a later process finds it."""
    folder.close()
    again = RunFolder(folder.output)
    return again, open_folder(again, **changes)


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([5, 3, 0])])
    folder.commit([finished([1, 4])])
    (folder.path / "tmp" / "left").touch()
    folder, done = reopened(folder, num_rows=7)
    assert done.rows.tolist() == [True, True, False, True, True, True, False] and not done.complete
    assert done.by_reason == {"stop": 3, "length": 2} and not done.by_error
    assert (done.prompt_tokens, done.completion_tokens) == (6 + 4 + 1 + 2 + 5, 15)
    assert not list((folder.path / "tmp").iterdir())
    folder.commit([finished([6, 2])])
    assert [part.name for part in done.parts] == [f"part-00000{i}.parquet" for i in (1, 2, 3)]
    table = pq.read_table(folder.merge(INPUT_SCHEMA, inputs(7, 3), 7))
    assert table["generated_text"].to_pylist() == [f"answer {i}" for i in range(7)]


def failed(rows: list[int]) -> pa.RecordBatch:
    batch = finished(rows)
    n = len(rows)
    columns = [*batch.columns[:2], pa.nulls(n, pa.string()), pa.array(["error"] * n), *batch.columns[4:6]]
    columns += [pa.array(["too_long"] * n), pa.array(["the prompt is too long"] * n)]
    return pa.RecordBatch.from_arrays(columns, schema=part_schema())


def test_rows_that_failed_run_again_if_asked_and_the_later_result_counts(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0, 2]), failed([1, 3])])
    folder, done = reopened(folder, num_rows=4)
    assert done.complete and done.by_error == {"too_long": 2} and done.failed == 0
    folder, done = reopened(folder, num_rows=4, retry_errors=True)
    assert done.rows.tolist() == [True, False, True, False] and done.failed == 2 and not done.by_error
    folder.commit([finished([1], "again"), failed([3])])
    folder, done = reopened(folder, num_rows=4)
    assert done.complete and done.by_reason == {"stop": 1, "length": 2, "error": 1}
    table = pq.read_table(folder.merge(INPUT_SCHEMA, inputs(4, 3), 4))
    assert table["generated_text"].to_pylist() == ["answer 0", "again 1", "answer 2", None]


def test_another_job_is_refused_by_name(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0])])
    folder.close()
    folder = RunFolder(folder.output)
    with pytest.raises(Refused, match=r"out\.run was begun with another input and model; .* --overwrite"):
        open_folder(folder, fingerprints={"input": "abd", "model": "x"})
    folder.close()
    assert open_folder(folder, fingerprints={"input": "abc", "engine": "newer"}).count == 1
    folder, done = reopened(folder, fingerprints={"input": "abd"}, overwrite=True)
    assert done.count == 0 and not list((folder.path / "parts").iterdir())


def test_a_part_of_another_job_is_refused(tmp_path: Path) -> None:
    folder, other = new_folder(tmp_path), RunFolder(tmp_path / "other.parquet")
    open_folder(other, fingerprints={"input": "xyz"})
    other.commit([finished([0])])
    shutil.copy(other.path / "parts" / "part-000001.parquet", folder.path / "parts" / "part-000004.parquet")
    with pytest.raises(Refused, match=r"part-000004\.parquet belongs to a job with another input"):
        reopened(folder)


def test_rows_beyond_the_input_are_refused(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0, 7])])
    with pytest.raises(Refused, match="belongs to a job with another input"):
        reopened(folder, num_rows=7)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_part_that_is_no_part_is_named_with_the_remedy(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = new_folder(tmp_path)
    folder.commit([finished([0, 1])])
    part = folder.path / "parts" / "part-000001.parquet"
    part.write_bytes(damage(part.read_bytes()))
    folder.close()
    with pytest.raises(OSError, match=r"part-000001\.parquet is damaged: .*; remove it, and its rows are computed"):
        open_folder(folder)
    folder.close()
    part.unlink()
    assert open_folder(folder).count == 0


def test_an_output_without_its_run_is_never_touched(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.refuse_foreign()
    folder.output.write_bytes(b"old")
    with pytest.raises(Refused, match=r"out\.parquet exists; .* --overwrite"):
        open_folder(folder)
    folder, _ = reopened(folder, overwrite=True)
    assert not folder.output.exists()


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.path.mkdir()
    (folder.path / "thesis.tex").touch()
    with pytest.raises(Refused, match="holds files that no run wrote"):
        folder.refuse_foreign()


def test_a_file_or_directory_in_the_way_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.output.mkdir()
    with pytest.raises(Refused, match="is a directory"):
        folder.refuse_foreign()
    other = RunFolder(tmp_path / "other.parquet")
    other.path.touch()
    with pytest.raises(Refused, match=r"other\.run is a file"):
        other.refuse_foreign()


def test_many_parts_need_few_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = new_folder(tmp_path)
    n = 140
    for i in range(n):
        folder.commit([finished([i, n + i])])  # every part is open, so to speak, for most of the merge
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        merged = folder.merge(INPUT_SCHEMA, inputs(2 * n, 50), 2 * n)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pq.read_metadata(merged).num_rows == 2 * n
