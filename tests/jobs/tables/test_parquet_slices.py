"""How many rows of Parquet are decoded at once: few if values are large and repeated, and many if they are short."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import Refused
from batchinfer.jobs.tables import batches, parquet, parquet_footer
from batchinfer.jobs.tables.batches import SLICE_ROWS
from batchinfer.jobs.tables.parquet_footer import Footer
from batchinfer.jobs.tables.table import Table

BATCH_BYTES = 1 << 20
ROWS = 8 * SLICE_ROWS
SHORT = [f"text {i} " + "y" * 100 for i in range(ROWS)]  # a dictionary of 100 KB: it would fit in a batch ten times
LARGE = ["x" * (BATCH_BYTES // 10 - 100)] * 100 + SHORT[100:]  # much smaller than a batch, unless rows repeat it
CODECS = ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]


@pytest.fixture(autouse=True)
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[pa.RecordBatch]:
    """Make batches small; return the list of the slices that are decoded, which grows."""
    slices: list[pa.RecordBatch] = []

    def noting(each_slice: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
        def noted() -> Iterator[pa.RecordBatch]:
            for each in each_slice:
                slices.append(each)
                yield each

        return grouped(noted(), rows)

    grouped = parquet.grouped
    monkeypatch.setattr(batches, "BATCH_BYTES", BATCH_BYTES)
    monkeypatch.setattr(parquet, "grouped", noting)
    return slices


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def whole(path: Path) -> pa.Table:
    table = Table.open([path])
    return pa.Table.from_batches([batch for _, batch in table.batches(None, 500)], table.schema)


def sizes(slices: list[pa.RecordBatch]) -> list[int]:
    return [each.num_rows for each in slices]


@pytest.mark.parametrize("codec", CODECS)
def test_short_values_of_every_codec_are_decoded_many_at_once(
    tmp_path: Path, decoded: list[pa.RecordBatch], codec: str
) -> None:
    table = pa.table({"prompt": SHORT})
    pq.write_table(table, tmp_path / "in.parquet", compression=codec)
    assert whole(tmp_path / "in.parquet").equals(table)
    assert sizes(decoded) == [SLICE_ROWS] * 8


@pytest.mark.parametrize("codec", CODECS)
def test_a_large_value_that_rows_repeat_bounds_slices_of_every_codec(
    tmp_path: Path, decoded: list[pa.RecordBatch], codec: str
) -> None:
    table = pa.table({"prompt": LARGE})
    pq.write_table(table, tmp_path / "in.parquet", compression=codec)
    assert whole(tmp_path / "in.parquet").equals(table)
    assert max(each.nbytes for each in decoded) <= BATCH_BYTES
    assert max(sizes(decoded)) == 10


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()],
    ids=str,
)
@pytest.mark.parametrize(("values", "rows"), [(SHORT, SLICE_ROWS), (LARGE, 10)], ids=["short", "large"])
def test_every_type_and_nulls(
    tmp_path: Path, decoded: list[pa.RecordBatch], kind: pa.DataType, values: list[str], rows: int
) -> None:
    sparse = [None if i % 5 == 0 else value for i, value in enumerate(values)]
    path = write(tmp_path / "in.parquet", prompt=pa.array(sparse, kind))
    assert whole(path)["prompt"].to_pylist() == pa.array(sparse, kind).to_pylist()
    assert sizes(decoded)[0] == rows


def test_values_behind_a_full_dictionary(tmp_path: Path, decoded: list[pa.RecordBatch]) -> None:
    table = pa.table({"prompt": SHORT})
    path = tmp_path / "in.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=20_000, data_page_size=10_000, write_batch_size=64)
    assert {"PLAIN", "RLE_DICTIONARY"} < set(pq.ParquetFile(path).metadata.row_group(0).column(0).encodings)
    assert whole(path).equals(table)
    assert sizes(decoded) == [SLICE_ROWS] * 8


def test_each_row_group_has_its_own_bound(tmp_path: Path, decoded: list[pa.RecordBatch]) -> None:
    table = pa.table({"prompt": [*SHORT, *LARGE[:100]]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=ROWS)
    assert whole(tmp_path / "in.parquet").equals(table)
    assert sizes(decoded) == [SLICE_ROWS] * 8 + [10] * 10


def test_a_row_group_may_be_empty(tmp_path: Path, decoded: list[pa.RecordBatch]) -> None:
    table = pa.table({"prompt": SHORT})
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert [group.rows for group in Footer.read(tmp_path / "in.parquet").groups] == [0, ROWS]
    assert whole(tmp_path / "in.parquet").equals(table)
    assert sizes(decoded) == [SLICE_ROWS] * 8


def test_rows_have_the_largest_value_of_each_column(tmp_path: Path, decoded: list[pa.RecordBatch]) -> None:
    table = pa.table({"a": LARGE, "b": LARGE, "c": SHORT})
    pq.write_table(table, tmp_path / "in.parquet")
    assert whole(tmp_path / "in.parquet").equals(table)
    assert max(sizes(decoded)) == BATCH_BYTES // (2 * len(LARGE[0]) + len(SHORT[-1])) == 5


@pytest.mark.parametrize(("values", "rows"), [(SHORT, SLICE_ROWS), (LARGE, 10)], ids=["short", "large"])
def test_structs(tmp_path: Path, decoded: list[pa.RecordBatch], values: list[str], rows: int) -> None:
    path = write(tmp_path / "in.parquet", nested=[None, *({"a": value, "b": i} for i, value in enumerate(values))])
    assert whole(path)["nested"].to_pylist()[1:] == [{"a": value, "b": i} for i, value in enumerate(values)]
    assert max(sizes(decoded)) == rows


def test_lists_count_as_if_each_value_was_the_whole_dictionary(tmp_path: Path, decoded: list[pa.RecordBatch]) -> None:
    lists = [*([] for _ in range(900)), *(10 * [text] for text in SHORT[:100])]
    path = write(tmp_path / "in.parquet", lists=lists)
    assert whole(path)["lists"].to_pylist() == lists
    assert max(sizes(decoded)) == BATCH_BYTES // (2 * sum(4 + len(text) for text in SHORT[:100])) == 46


@pytest.mark.parametrize("writer", ["duckdb", "polars"])
@pytest.mark.parametrize(("values", "rows"), [(SHORT, SLICE_ROWS), (LARGE, 10)], ids=["short", "large"])
def test_other_writers(
    tmp_path: Path, decoded: list[pa.RecordBatch], writer: str, values: list[str], rows: int
) -> None:
    path, rows_written = tmp_path / "in.parquet", 16 * values[98:]
    frame = pl.DataFrame({"prompt": rows_written})
    if writer == "polars":
        frame.write_parquet(path)
    else:
        duckdb.sql(f"copy (select * from frame) to '{path}' (format parquet)")
    assert "_DICTIONARY" in str(pq.ParquetFile(path).metadata.row_group(0).column(0).encodings)
    assert whole(path)["prompt"].to_pylist() == rows_written
    assert max(sizes(decoded)) == rows


def test_a_dictionary_that_cannot_be_measured_counts_as_one_value(
    tmp_path: Path, decoded: list[pa.RecordBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_footer, "CODECS", {})
    path = write(tmp_path / "in.parquet", prompt=SHORT)
    assert whole(path)["prompt"].to_pylist() == SHORT
    assert max(sizes(decoded)) == BATCH_BYTES // sum(4 + len(text) for text in SHORT) == 9


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_dictionary_is_refused(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": SHORT}), path, compression=codec, write_page_checksum=True)
    (chunk,) = Footer.read(path).groups[0].chunks
    data = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    places = range(chunk.start + parquet_footer.HEADER_BYTES, data, (data - chunk.start) // 40)
    assert len(places) > 30
    for at in places:
        pages = bytearray(path.read_bytes())
        pages[at] ^= 255
        (tmp_path / "damaged.parquet").write_bytes(pages)
        with pytest.raises(Refused, match=r"cannot be read as Parquet: .*CRC"):
            whole(tmp_path / "damaged.parquet")
