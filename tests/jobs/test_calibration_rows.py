"""Which rows a model is calibrated with: as many as asked for, the same each time, whatever the table is like."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repository import TARGET

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.calibration_rows import TokenIds, calibration_sequences
from batchinfer.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(TARGET)


def table(folder: Path, texts: Sequence[str | None]) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "t.parquet", row_group_size=7)
    return folder / "t.parquet"


def drawn(data: Path | None, rows: int = 5, tokens: int = 16, seed: int = 0) -> list[TokenIds]:
    return calibration_sequences(data, "text", rows, tokens, seed, TOKENIZER)


def same(a: list[TokenIds], b: list[TokenIds]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def test_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(200)]
    data = table(tmp_path, texts)
    first = drawn(data, tokens=64)
    assert same(first, drawn(data, tokens=64)) and not same(first, drawn(data, tokens=64, seed=1))
    whole = [TOKENIZER.encode_batch([text])[0] for text in texts]
    places = [next(i for i, ids in enumerate(whole) if np.array_equal(ids, row)) for row in first]
    assert len(set(places)) == 5 and places != sorted(places) and max(places) > 50


def test_of_long_rows_a_piece_and_of_few_rows_several(tmp_path: Path) -> None:
    long = "\n".join(f"value_{i} = compute({i})" for i in range(100))
    data = table(tmp_path, [long, None, "", "x = 1\n"])
    rows = drawn(data, rows=9)
    ids = TOKENIZER.encode_batch([long])[0].tolist()
    assert len(rows) == 9 and sorted(map(len, rows))[1:] == [16] * 8, "whole pieces, and the short row"
    starts = [i for row in rows for i in range(len(ids)) if row.tolist() == ids[i : i + 16] and len(row) == 16]
    assert len({start % 16 for start in starts}) == 1 and len(set(starts)) == len(starts) == 8, "and no overlap"
    assert len(drawn(data, rows=10_000)) == len(ids) // 16 + 1, "and no more than there are"
    assert len({tuple(map(tuple, drawn(data, rows=1, seed=seed))) for seed in range(9)}) > 2


def test_rows_with_text_are_found_where_they_are_few(tmp_path: Path) -> None:
    texts: list[str | None] = [None] * 9000
    for i in (17, 4100, 8999):
        texts[i] = f"value = {i} + something_else({i})\n" * 8
    assert len(drawn(table(tmp_path, texts), rows=3)) == 3


def test_without_a_table_the_standard_library_is_read() -> None:
    rows = drawn(None, rows=20, tokens=32)
    assert len(rows) == 20 and same(rows, drawn(None, rows=20, tokens=32))
    text = TOKENIZER.decode_batch(np.concatenate(rows), np.array([0, sum(map(len, rows))]))[0]
    assert "def " in text or "import " in text


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="column 'text' has no text of two tokens or more to calibrate with"):
        drawn(table(tmp_path, [None, ""]))
    with pytest.raises(Refused, match="has no column 'txt'; its columns are 'text'"):
        calibration_sequences(table(tmp_path, ["abc def"]), "txt", 1, 8, 0, TOKENIZER)
    for rows, tokens, message in ((0, 8, "--calibration-rows is 0"), (1, 1, "--calibration-tokens is 1")):
        with pytest.raises(UsageError, match=message):
            drawn(None, rows, tokens)
