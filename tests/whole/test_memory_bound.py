"""The job's own process under a bound, whatever the input inflates to: measured in a process of its own."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repository import ROOT
from stub_jobs import make_model

BOUND = 600_000_000
CELL = 100 << 20
CODE = """
import sys
from functools import partial
from batchinfer.jobs.cli.main import main  # first, as in the command: it chooses pyarrow's allocator
from batchinfer.jobs import job

if __name__ == "__main__":
    job.run = partial(job.run, engine="batchinfer.jobs.process.stub_engine:StubEngine")
    main()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peak_of_job(folder: Path, path: Path, output: str = "out.parquet") -> int:
    """Run the job over this input; the most that its process had resident, in bytes."""
    (folder / "main.py").write_text(CODE)
    model = folder / "model"
    model.mkdir()
    make_model(model)
    # Where pandas is installed, pyarrow loads it: 24 MB. It is here for other tests; batchinfer does not bring it.
    (folder / "pandas.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, folder / "main.py", "run", path, "-o", folder / output, "--model", model]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode in (0, 65) and "Traceback" not in done.stderr, done.stderr
    report = json.loads((folder / "out.run" / "report.json").read_text())
    peak = int(report["peak_memory_bytes"]["parent"])
    print(f"{path.name}: {peak / 1e6:.0f} MB")
    return peak


def repeated(path: Path, value: str, rows: int, **options: Any) -> None:
    """One value, stored once, in each of the rows."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    pq.write_table(pa.table({"prompt": column}), path, store_schema=False, compression="zstd", **options)


def codes(path: Path) -> list[str | None]:
    found: list[str | None] = pq.read_table(path, columns=["error_code"])["error_code"].to_pylist()
    return found


def test_a_small_file_that_inflates_to_gigabytes(tmp_path: Path) -> None:
    repeated(tmp_path / "in.parquet", "x" * (5 << 20), 400)
    assert (tmp_path / "in.parquet").stat().st_size < 43_000
    assert peak_of_job(tmp_path, tmp_path / "in.parquet") < BOUND
    assert codes(tmp_path / "out.parquet") == ["too_large"] * 400


@pytest.mark.long
def test_a_small_file_of_rows_that_are_all_tokenized(tmp_path: Path) -> None:
    repeated(tmp_path / "in.parquet", "x" * (1 << 20), 100)
    assert peak_of_job(tmp_path, tmp_path / "in.parquet") < BOUND
    assert codes(tmp_path / "out.parquet") == ["too_long"] * 100


@pytest.mark.long
def test_a_row_group_of_400_000_rows(tmp_path: Path) -> None:
    texts = [f"{i} " + "x" * 40 for i in range(400_000)]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "in.parquet", row_group_size=len(texts))
    assert peak_of_job(tmp_path, tmp_path / "in.parquet") < BOUND
    assert codes(tmp_path / "out.parquet") == [None] * len(texts)


def as_json(path: Path, cells: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": cell}) + "\n" for cell in cells))


def as_csv(path: Path, cells: list[str]) -> None:
    path.write_text("prompt,n\n" + "".join(f'"{cell}",1\n' for cell in cells))


def as_parquet(path: Path, cells: list[str]) -> None:
    pq.write_table(pa.table({"prompt": cells}), path, compression="zstd")


@pytest.mark.parametrize(("name", "write"), [("in.jsonl", as_json), ("in.csv", as_csv), ("in.parquet", as_parquet)])
@pytest.mark.parametrize("cell", ["x" * CELL, base64.b64encode(os.urandom(CELL * 3 // 4)).decode()], ids=["x", "noise"])
def test_a_cell_of_100_megabytes_is_one_bad_row(
    tmp_path: Path, name: str, write: Callable[[Path, list[str]], None], cell: str
) -> None:
    cells = ["good", cell, "good"]
    write(tmp_path / name, cells)
    assert peak_of_job(tmp_path, tmp_path / name) < BOUND
    assert codes(tmp_path / "out.parquet") == [None, "too_large", None]
    assert pq.read_table(tmp_path / "out.parquet")["prompt"].to_pylist() == cells


@pytest.mark.parametrize("last", ["x", "🙂"], ids=["ascii", "emoji"])
def test_a_cell_of_100_megabytes_is_a_line_of_json(tmp_path: Path, last: str) -> None:
    """Python holds text with one character beyond 16 bits in four bytes a character."""
    cells = ["good", "x" * (CELL - 4) + last, "good"]
    as_parquet(tmp_path / "in.parquet", cells)
    assert peak_of_job(tmp_path, tmp_path / "in.parquet", "out.jsonl") < BOUND
    with (tmp_path / "out.jsonl").open("rb") as file:
        assert [json.loads(line)["prompt"] for line in file] == cells
