"""CSV and TSV with any delimiter, against Python's csv module, which wrote the files."""

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, make_model, prompts, spec

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.flag_values import delimiter_of, encoding_of
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.report import Report
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table

ROWS = [
    ["id", "prompt"],
    ["1", "a, b; c | d \t e"],
    ["2", 'say "hi"'],
    ["3", "two\nlines"],
    ["4", ""],
    ["5", "🙂 \u2028"],
]


def table(path: Path, delimiter: str, rows: list[list[str]] = ROWS, encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return path


def read(*paths: Path, **options: Any) -> list[list[str]]:
    """Names and values, as `ROWS`."""
    found = Table.open(paths, **options)
    rows = [list(row.values()) for _, batch in found.batches(None, 2) for row in batch.to_pylist()]
    assert len(rows) == found.num_rows
    return [found.schema.names, *rows]


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t", ":", " "])
def test_any_delimiter_gives_the_same_table(tmp_path: Path, delimiter: str) -> None:
    assert read(table(tmp_path / "in.csv", delimiter), csv_delimiter=delimiter) == ROWS


def test_tsv_is_a_table_by_its_name(tmp_path: Path) -> None:
    assert read(table(tmp_path / "in.tsv", "\t")) == ROWS
    assert read(table(tmp_path / "IN.TSV", "\t")) == ROWS


def test_a_folder_may_hold_both_and_the_delimiter_is_of_csv_alone(tmp_path: Path) -> None:
    table(tmp_path / "1.csv", ";")
    table(tmp_path / "2.tsv", "\t")
    assert read(tmp_path, csv_delimiter=";") == ROWS + ROWS[1:]


def test_a_delimiter_without_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--csv-delimiter is ';', but no input ends in \.csv; leave it out"):
        read(table(tmp_path / "in.tsv", "\t"), csv_delimiter=";")


def test_another_delimiter_than_the_file_has_is_told_by_its_columns(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has no column 'prompt'; its columns are 'id;prompt'"):
        Table.open([table(tmp_path / "in.csv", ";", [["id", "prompt"], ["1", "x"]])]).check(["prompt"])


@pytest.mark.parametrize(("delimiter", "shown"), [(";", "';'"), ("\t", r"'\\t'"), ("|", r"'\|'")])
@pytest.mark.parametrize("value", ["x", "x, y"])
def test_the_delimiter_that_a_file_has_is_named(tmp_path: Path, delimiter: str, shown: str, value: str) -> None:
    """Also where a value holds a comma, so that the file cannot be read at all."""
    path = table(tmp_path / "in.csv", delimiter, [["id", "prompt"], ["1", value]])
    remedy = f"; if it is CSV separated by {shown}, give --csv-delimiter {shown}$"
    with pytest.raises(Refused, match=remedy):
        Table.open([path]).check(["prompt"])
    assert read(path, csv_delimiter=delimiter) == [["id", "prompt"], ["1", value]]


def test_a_file_with_the_right_delimiter_has_no_remedy(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,a;b\n1\n")
    with pytest.raises(Refused, match=r"Expected 2 columns, got 1$"):
        read(tmp_path / "in.csv")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "utf-7"]
)
def test_any_encoding_gives_the_same_table(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = table(tmp_path / f"in.{suffix}", "\t" if suffix == "tsv" else ",", encoding=encoding)
    assert read(path, csv_encoding=encoding) == ROWS


def test_an_encoding_holds_over_the_borders_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.tables.csv.CSV_BLOCK_BYTES", 999)
    rows = [["id", "prompt"], *([str(i), "🙂é" * (i % 5)] for i in range(500)), ["500", "x" * 5000]]
    assert read(table(tmp_path / "in.csv", ",", rows, "utf-16"), csv_encoding="utf-16") == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_wide_encoding_that_a_file_has_is_named(tmp_path: Path, encoding: str) -> None:
    path = table(tmp_path / "in.csv", ",", [["id", "prompt"], ["1", "a, b"]], encoding)
    with pytest.raises(Refused, match=rf"in\.csv is not UTF-8 but {encoding}; give --csv-encoding {encoding}$"):
        read(path)


def test_a_header_in_another_encoding_is_told_of_the_flag(tmp_path: Path) -> None:
    path = table(tmp_path / "in.csv", ",", [["größe", "prompt"], ["1", "a"]], "cp1252")
    with pytest.raises(Refused, match=r"cannot be read as CSV: .*; name its encoding with --csv-encoding, as in"):
        read(path)
    assert read(path, csv_encoding="cp1252") == [["größe", "prompt"], ["1", "a"]]


def test_bytes_that_the_encoding_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,prompt\n1,\x81\n")
    with pytest.raises(Refused, match=r"cannot be read as CSV: .* can't decode byte 0x81"):
        read(tmp_path / "in.csv", csv_encoding="cp1252")


def test_an_encoding_without_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UsageError, match=r"--csv-encoding is 'cp1252', but no input ends in \.csv or \.tsv; leave it"):
        read(tmp_path / "in.jsonl", csv_encoding="cp1252")


@pytest.mark.parametrize(("text", "name"), [("latin-1", "iso8859-1"), ("UTF8", "utf-8"), ("windows-1252", "cp1252")])
def test_what_is_an_encoding(text: str, name: str) -> None:
    assert encoding_of("--csv-encoding", text) == name


@pytest.mark.parametrize("text", ["", "nope", "rot13", "base64", "undefined", "idna", "punycode", "a\0b", "é"])
def test_what_is_no_encoding_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"^--csv-encoding is .*, which is no text encoding; give one that Python knows"
    ):
        encoding_of("--csv-encoding", text)


@pytest.mark.parametrize(("text", "delimiter"), [(";", ";"), ("|", "|"), (r"\t", "\t"), ("\t", "\t"), ("\\", "\\")])
def test_what_is_a_delimiter(text: str, delimiter: str) -> None:
    assert delimiter_of("--csv-delimiter", text) == delimiter
    arguments = ["in.csv", "-o", "out.jsonl", "--model", "m", "--csv-delimiter", text]
    assert job_of(arguments).csv_delimiter == delimiter


@pytest.mark.parametrize("text", ["", ";;", '"', "'", "\r", "\n", r"\n", "é", "\u3001"])
def test_what_is_no_delimiter_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"^--csv-delimiter is .*; give one ASCII character that is neither a quote nor a line end"
    ):
        delimiter_of("--csv-delimiter", text)


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    rows = [[str(i), text] for i, text in enumerate(prompts(20))]
    path = table(tmp_path / "in.csv", ";", [["id", "prompt"], *rows])
    return spec(make_model(tmp_path), path, csv_delimiter=";")


def again(job: JobSpec, **changes: Any) -> JobSpec:
    return spec(Path(job.model), *job.inputs, **{"csv_delimiter": job.csv_delimiter, "output": job.output, **changes})


def test_a_run_goes_on_with_the_same_delimiter_only(job: JobSpec) -> None:
    assert run(job, STUB).rows == 20
    assert run(again(job), STUB).rows_computed == 20, "complete already"
    with pytest.raises(Refused, match="has no column 'prompt'"):
        run(again(job, csv_delimiter="|"), STUB)


def test_a_comma_is_what_it_is_without_the_flag(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", ",", [["prompt"], ["a"], ["b"]])
    job = spec(make_model(tmp_path), source)
    run(job, STUB)
    assert run(again(job, csv_delimiter=","), STUB).rows == 2
    with pytest.raises(Refused, match="was begun with another csv_delimiter;"):
        run(again(job, csv_delimiter=";"), STUB)


def test_a_growing_table_may_be_written_with_another_delimiter(job: JobSpec, tmp_path: Path) -> None:
    def grow(job: JobSpec) -> Report:
        return run_new_rows(job, lambda part: run(part, STUB))

    growing = again(job, output=tmp_path / "answers", incremental=True, id_column="id")
    assert grow(growing).rows == 20
    table(job.inputs[0], "|", [["id", "prompt"], ["0", prompts(1)[0]], ["20", "new"]])
    report = grow(again(growing, csv_delimiter="|", incremental=True, id_column="id"))
    assert report.rows == 1 and pq.read_table(growing.output).num_rows == 21


def test_a_run_goes_on_with_the_same_encoding_only(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", ",", [["prompt", "by"], ["a", "José"]], "cp1252")
    job = spec(make_model(tmp_path), source, csv_encoding="cp1252")
    run(job, STUB)
    assert pq.read_table(job.output)["by"].to_pylist() == ["José"]
    with pytest.raises(Refused, match="was begun with another csv_encoding;"):
        run(again(job, csv_delimiter=None, csv_encoding="cp437"), STUB)
    with pytest.raises(Refused, match="was begun with another csv_encoding;"):
        run(again(job, csv_delimiter=None), STUB)


def test_a_growing_table_may_be_written_in_another_encoding(tmp_path: Path) -> None:
    def grow(encoding: str | None, *ids: str) -> Report:
        table(tmp_path / "in.csv", ",", [["id", "prompt"], *([i, "é"] for i in ids)], encoding or "utf-8")
        options: dict[str, Any] = {"output": tmp_path / "answers", "incremental": True, "id_column": "id"}
        job = spec(make_model(tmp_path), tmp_path / "in.csv", csv_encoding=encoding, **options)
        return run_new_rows(job, lambda part: run(part, STUB))

    assert grow("cp1252", "1", "2").rows == 2
    assert grow(None, "1", "2", "3").rows == 1
    assert pq.read_table(tmp_path / "answers")["prompt"].to_pylist() == ["é"] * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_the_file_has_not_is_refused(tmp_path: Path, encoding: str) -> None:
    """For a file without a byte order mark, some codecs raise an error of another class."""
    (tmp_path / "in.csv").write_bytes(b"prompt,x\nh-\xff,1\n")
    with pytest.raises(Refused, match=r"in.csv cannot be read as CSV: .*; name its encoding with --csv-encoding"):
        Table.open([tmp_path / "in.csv"], csv_encoding=encoding)
