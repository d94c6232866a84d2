"""Damaged tables: whatever bytes come in, there is one clear refusal or the rows that the file holds.

Of Parquet in a child process: where pyarrow ends it, this test fails and the others run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repository import ROOT, SUPPORT

from batchinfer.errors import Refused
from batchinfer.jobs.tables import batches, json_lines
from batchinfer.jobs.tables.table import Table

ROWS = 40
COLUMNS: dict[str, Any] = {
    "prompt": [None if i % 9 == 5 else f"prompt {i % 13} é" for i in range(ROWS)],
    "id": list(range(ROWS)),
    "messages": [[{"role": "user", "content": f"text {i}"}] * (i % 3) for i in range(ROWS)],
    "flag": [i % 2 == 0 for i in range(ROWS)],
}
WRITTEN: list[dict[str, Any]] = [
    {"compression": "snappy"},
    {"compression": "zstd", "row_group_size": 7},
    {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
    {"compression": "none", "use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
]

# Where, as a share of the file; what is done there; and the bytes for it.
Damage = list[tuple[float, str, bytes]]
DAMAGE: st.SearchStrategy[Damage] = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "put", "insert", "delete", "cut", "splice"]),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, damage: Damage) -> bytes:
    for share, what, extra in damage:
        at = int(share * len(data))
        pieces = {
            "flip": data[:at] + bytes([data[at] ^ (1 << extra[0] % 8)]) + data[at + 1 :] if data else data,
            "put": data[:at] + extra + data[at + len(extra) :],
            "insert": data[:at] + extra + data[at:],
            "delete": data[:at] + data[at + extra[0] :],
            "cut": data[:at],
            "splice": data[:at] + data[at // 2 :],
        }
        data = pieces[what]
    return data


def rows_or_refusal(path: Path) -> pa.Table | None:
    """All rows, found well formed; None where the file was refused. Any other error is raised."""
    try:
        ours = Table.open([path])
        batches = [batch.replace_schema_metadata(None) for _, batch in ours.batches(None, 16)]
    except Refused as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error).removeprefix(str(path))
        return None
    assert sum(map(len, batches)) == ours.num_rows
    return pa.Table.from_batches(batches, ours.schema.remove_metadata())


def fuzz_parquet(examples: int) -> None:
    """Many damaged Parquet files; runs in a child process."""
    folder = Path(tempfile.mkdtemp())
    path, table = folder / "in.parquet", pa.table(COLUMNS)
    batches.BATCH_BYTES = 1 << 12  # so that dictionaries are measured, which else are too small
    originals = []
    for options in WRITTEN:
        pq.write_table(table, path, write_page_checksum=True, **options)
        originals.append(path.read_bytes())

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(originals), DAMAGE, st.booleans())
    def fuzz(original: bytes, damage: Damage, in_footer: bool) -> None:
        # The footer is small, and where most of the harm is done.
        footer = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
        pages, rest = original[:footer], original[footer:]
        data = pages + damaged(rest, damage) if in_footer else damaged(pages, damage) + rest
        path.write_bytes(data)
        found = rows_or_refusal(path)
        if found is not None and not in_footer:
            assert found.equals(table)

    fuzz()


def child(examples: int) -> None:
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path}
    code = f"import test_table_fuzz; test_table_fuzz.fuzz_parquet({examples})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, env=environment, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"


def test_damaged_parquet_is_refused_or_right() -> None:
    child(300)


@pytest.mark.long
def test_much_damaged_parquet_is_refused_or_right() -> None:
    child(20_000)


LINES = "".join(json.dumps({name: COLUMNS[name][i] for name in COLUMNS}) + "\n" for i in range(ROWS)).encode()
CSV = ("prompt,id,flag\n" + "".join(f'"line {i}\nof, ""text""",{i},true\n' for i in range(ROWS))).encode()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
FUZZED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FEW, MANY = settings(FUZZED, max_examples=300), settings(FUZZED, max_examples=10_000)


def fuzz_text(path: Path, original: bytes) -> Callable[[Damage], None]:
    def fuzz(damage: Damage) -> None:
        path.write_bytes(damaged(original, damage))
        rows_or_refusal(path)

    return fuzz


def fuzz_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], None]:
    """JSON of any kind, looked at in blocks of 2 rows: what is not refused can be written, and holds as many rows."""
    monkeypatch.setattr(json_lines, "SLICE_ROWS", 2)

    def fuzz(rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps({"prompt": "x", **row}) + "\n" for row in rows for _ in range(3)))
        found = rows_or_refusal(path)
        if found is not None:
            assert len(found) == 3 * len(rows)
            pq.write_table(found, path.with_suffix(".out"))
            assert pq.read_metadata(path.with_suffix(".out")).num_rows == len(found)

    return fuzz


ROW_LISTS = st.lists(st.dictionaries(st.sampled_from(["a", "b"]), VALUES), min_size=1, max_size=3)


@pytest.mark.parametrize(("name", "original"), [("in.jsonl", LINES), ("in.csv", CSV)])
def test_damaged_text_is_refused_or_right(tmp_path: Path, name: str, original: bytes) -> None:
    FEW(given(DAMAGE)(fuzz_text(tmp_path / name, original)))()


def test_any_values_of_json_are_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FEW(given(ROW_LISTS)(fuzz_values(tmp_path / "in.jsonl", monkeypatch)))()


@pytest.mark.long
@pytest.mark.parametrize(("name", "original"), [("in.jsonl", LINES), ("in.csv", CSV)])
def test_much_damaged_text_is_refused_or_right(tmp_path: Path, name: str, original: bytes) -> None:
    MANY(given(DAMAGE)(fuzz_text(tmp_path / name, original)))()


@pytest.mark.long
def test_many_values_of_json_are_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MANY(given(ROW_LISTS)(fuzz_values(tmp_path / "in.jsonl", monkeypatch)))()
