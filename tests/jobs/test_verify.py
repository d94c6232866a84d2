"""Whatever is changed in a finished job's files is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, limit, make_model, prompts, spec, write

from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.verify import verify


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of three parts, of which the last holds rows that failed before."""
    folder = make_model(tmp_path_factory.mktemp("job"))
    path = write(folder / "in.parquet", prompt=[*prompts(99), None])
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, Limits(slice_rows=32, chunk_rows=64))
        run(spec(folder, path, commit_rows=64), STUB)
        run(spec(folder, path, commit_rows=1, retry_errors=True), STUB)
    assert len(list((folder / "out.run" / "parts").iterdir())) == 3
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def test_a_finished_job_is_counted(finished: Path) -> None:
    table = pq.read_table(finished / "out.parquet")
    tokens = sum(table["prompt_tokens"].drop_null().to_pylist())
    lines = verify(finished / "out.parquet")
    assert "100 rows (1 error, " in lines[0] and f" {tokens:,} prompt tokens" in lines[0]
    assert lines[1] == "3 parts, report and output agree; all hashes are right"


FILES = ["out.parquet", *(f"out.run/parts/part-00000{i}.parquet" for i in (1, 2, 3))]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.01, 0.4, 0.97])
def test_a_flipped_byte_is_found(finished: Path, name: str, place: float) -> None:
    data = bytearray((finished / name).read_bytes())
    data[int(len(data) * place)] ^= 1
    (finished / name).write_bytes(data)
    with pytest.raises(Refused, match=Path(name).name.replace(".", r"\.")):
        verify(finished / "out.parquet")


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("report.json", lambda r: r.update(rows=99), r"report\.json counts 99 rows"),
        ("report.json", lambda r: r.update(completion_tokens=1), r"report\.json counts .* 1 completion token,"),
        ("report.json", lambda r: r.update(rows_by_error={}), r"report\.json counts"),
        ("manifest.json", lambda m: m.update(rows=101), "row 100 is in no part"),
        ("manifest.json", lambda m: m.update(rows=99), "or a row that is not in the input"),
        ("manifest.json", lambda m: m["parts"].pop(), r"part-000003\.parquet is not in the manifest"),
        ("manifest.json", lambda m: m["parts"][1].update(rows=1), r"part-000002\.parquet .*rows is 35, not 1"),
        ("manifest.json", lambda m: m["parts"][0].pop("sha256"), r"manifest\.json is damaged"),
    ],
)
def test_counts_that_do_not_agree_are_named(
    finished: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    edit(finished / "out.run" / name, change)
    with pytest.raises(Refused, match=message):
        verify(finished / "out.parquet")


def test_an_output_of_no_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no job has begun at .*none\.parquet: there is no .*none\.run"):
        verify(tmp_path / "none.parquet")


@pytest.mark.parametrize("name", [*FILES, "out.run/manifest.json", "out.run/report.json"])
def test_a_missing_file_is_named(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(Refused, match=Path(name).name.replace(".", r"\.")):
        verify(finished / "out.parquet")
