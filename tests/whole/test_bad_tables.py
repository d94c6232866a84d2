"""Inputs and outputs that cannot be used are refused before any work: exit 65, one line that names the file, no trace
in the output's place."""

import base64
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from command_line import STUB, call
from stub_jobs import make_model, spec, write, write_json_lines

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables import ids
from batchinfer.jobs.tables.table import Table

P = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def json_lines(*values: Any) -> Callable[[Path], Any]:
    return lambda path: write_json_lines(path, *values)


def table(**columns: Any) -> Callable[[Path], Any]:
    return lambda path: write(path, **columns)


def encrypted(plaintext_footer: bool) -> Callable[[Path], Any]:
    class Kms(pe.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, master: str) -> bytes:
            return base64.b64encode(key)

    def make(path: Path) -> None:
        configuration = pe.EncryptionConfiguration(
            footer_key="k", column_keys={"c": ["prompt"]}, plaintext_footer=plaintext_footer
        )
        properties = pe.CryptoFactory(lambda _: Kms()).file_encryption_properties(
            pe.KmsConnectionConfig(), configuration
        )
        made = pa.table({"prompt": P})
        with pq.ParquetWriter(path, made.schema, encryption_properties=properties) as writer:
            writer.write_table(made)

    return make


def zigzag(number: int) -> bytes:
    coded, out = number << 1, bytearray()
    while coded > 127:
        out.append(coded & 127 | 128)
        coded >>= 7
    return bytes([*out, coded])


def claiming(rows: int, also: tuple[str, ...] = ()) -> Callable[[Path], Any]:
    """A file of 77 rows whose footer says `rows`, and with `also` its row group and its column too."""

    def make(path: Path) -> None:
        write(path, prompt=["x"] * 77)
        data = path.read_bytes()
        length = int.from_bytes(data[-8:-4], "little")
        body, footer = data[: -8 - length], data[-8 - length : -8]
        old, new = b"\x16" + zigzag(77), b"\x16" + zigzag(rows)  # field of 64 bits
        places = [i for i in range(len(footer)) if footer.startswith(old, i)]
        assert len(places) >= 3  # of the file, of the column, of the row group
        chosen = {"file": places[:1], "column": places[1:2], "group": places[-1:]}
        for place in sorted((i for name in ("file", *also) for i in chosen[name]), reverse=True):
            footer = footer[:place] + new + footer[place + len(old) :]
        path.write_bytes(body + footer + struct.pack("<I", len(footer)) + b"PAR1")

    return make


def flipped(path: Path) -> None:
    texts = [f"prompt {i}" for i in range(20_000)]
    pq.write_table(pa.table({"prompt": texts}), path, write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def without_footer(path: Path) -> None:
    write(path, prompt=P)
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[str, Callable[[Path], Any], list[str], str]] = {
    "duplicate ids": ("in.parquet", table(prompt=P, id=["x", "y", "x"]), ["--id-column", "id"], "rows 0 and 2"),
    "duplicate numbers": ("in.parquet", table(prompt=P, id=[1, 2, 2]), ["--id-column", "id"], "rows 1 and 2"),
    "duplicate ids in JSON": (
        "in.jsonl",
        json_lines({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}),
        ["--id-column", "id"],
        "column 'id' holds the same id in rows 0 and 1",
    ),
    "duplicate ids in CSV": (
        "in.csv",
        lambda path: path.write_text("id,prompt\n7,a\n7,b\n"),
        ["--id-column", "id"],
        "rows 0 and 1",
    ),
    "a null id": ("in.parquet", table(prompt=P, id=["x", None, "z"]), ["--id-column", "id"], "is null in row 1"),
    "an absent id": (
        "in.jsonl",
        json_lines({"prompt": "a", "id": 1}, {"prompt": "b"}),
        ["--id-column", "id"],
        "is null in row 1",
    ),
    "mixed ids": (
        "in.jsonl",
        json_lines({"prompt": "a", "id": "1"}, {"prompt": "b", "id": 2}),
        ["--id-column", "id"],
        "holds text and other values, as in row 1",
    ),
    "ids that are no ids": ("in.parquet", table(prompt=P, id=[0.5, 1, 2]), ["--id-column", "id"], "expected text or"),
    "no bytes": ("in.parquet", Path.touch, [], "has no bytes"),
    "no bytes of JSON": ("in.jsonl", Path.touch, [], "has no bytes"),
    "no footer": ("in.parquet", without_footer, [], "cannot be read as Parquet"),
    "a FIFO": ("in.parquet", os.mkfifo, [], "is a FIFO"),
    "a device": ("in.parquet", lambda path: path.symlink_to("/dev/zero"), [], "is a device"),
    "a link loop": ("in.parquet", lambda path: path.symlink_to(path), [], "Too many levels of symbolic links"),
    "2**62 rows": ("in.parquet", claiming(2**62), [], "the footer counts 4611686018427387904 rows"),
    "2**62 rows of a group": ("in.parquet", claiming(2**62, ("group",)), [], "its column 'prompt' 77"),
    "2**62 rows everywhere": ("in.parquet", claiming(2**62, ("group", "column")), [], "split the input"),
    "an encrypted column": ("in.parquet", encrypted(plaintext_footer=True), [], "is encrypted Parquet"),
    "an encrypted footer": ("in.parquet", encrypted(plaintext_footer=False), [], "is encrypted Parquet"),
    "no columns": ("in.parquet", table(), [], "has no column 'prompt'"),
    "objects without a key": ("in.jsonl", json_lines({}), [], "has 1 rows but no columns"),
    "a missing column": ("in.parquet", table(text=P), [], "has no column 'prompt'; its columns are 'text'"),
    "a struct for text": ("in.parquet", table(prompt=[{"a": "b"}] * 3), [], "expected text"),
    "a struct for text in JSON": ("in.jsonl", json_lines({"prompt": {"a": 1}}), [], "expected text"),
    "a clash": ("in.parquet", table(prompt=P, generated_text=P), [], "'generated_text', which the output adds"),
    "a clash in CSV": (
        "in.csv",
        lambda path: path.write_text("prompt,error_code\na,b\n"),
        [],
        "'error_code', which the output adds",
    ),
    "a key twice": (
        "in.jsonl",
        lambda path: path.write_text('{"prompt": "a", "prompt": "b"}\n'),
        [],
        "has a key twice",
    ),
    "a key of half a character": ("in.jsonl", json_lines({"prompt": "a", "\ud800": 1}), [], "is not UTF-8: '\\ud800'"),
    "values nested without end": (
        "in.jsonl",
        lambda path: path.write_text('{"prompt": "a", "x": ' + "[" * 900 + "]" * 900 + "}\n"),
        [],
        "line 1 is not JSON; expected one object on each line: its values are nested more than 500 levels deep",
    ),
    "a number of 5,000 digits": (
        "in.jsonl",
        lambda path: path.write_text('{"prompt": "a", "x": ' + "9" * 5000 + "}\n"),
        [],
        "line 1 is not JSON",
    ),
    "UTF-16": ("in.jsonl", lambda path: path.write_bytes('{"prompt": "a"}'.encode("utf-16")), [], "line 1 is not JSON"),
    "a time zone that is none": (
        "in.parquet",
        table(prompt=P, x=pa.array([0, 1, 2], pa.timestamp("us", "Mars/Base"))),
        ["--prompt-template", "{x}"],
        "column 'x' has the time zone 'Mars/Base', which this machine does not know",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_refused_before_any_work(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    name, make, flags, said = BAD[what]
    make(tmp_path / name)
    code, line = call(capsys, "run", tmp_path / name, "-o", tmp_path / "out.parquet", "--model", model, *flags)
    assert (code, said in line, str(tmp_path / name) in line) == (65, True, True), line
    assert os.listdir(tmp_path) == [name]


def test_a_flipped_bit_is_refused_when_its_page_is_read(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped(tmp_path / "in.parquet")
    code, line = call(capsys, "run", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--model", model)
    assert (code, "in.parquet cannot be read as Parquet" in line and "CRC" in line) == (65, True)
    assert not (tmp_path / "out.parquet").exists()


def test_equal_ids_are_found_across_files_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "BATCH_ROWS", 7)
    names = [f"id {i}" for i in range(100)]
    files = [write(tmp_path / f"{i}.parquet", id=part) for i, part in enumerate((names, [*names[90:91], "new"]))]
    ids.check_ids(Table.open(files[:1]), "id")
    with pytest.raises(Refused, match=r"0\.parquet and 1 more file: column 'id' holds the same id in rows 90 and 100"):
        ids.check_ids(Table.open(files), "id")


def test_hashes_that_agree_are_not_yet_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_hashes", lambda values: ids.np.array([len(value) for value in values], "u8"))
    ids.check_ids(Table.open([write(tmp_path / "a.parquet", id=["aa", "b", "cc", "d"])]), "id")
    with pytest.raises(Refused, match="rows 1 and 3"):
        ids.check_ids(Table.open([write(tmp_path / "b.parquet", id=["aa", "b", "cc", "b"])]), "id")


def test_shards_see_the_ids_of_all_rows(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["p"] * 4, id=["a", "b", "c", "a"])
    with pytest.raises(Refused, match="rows 0 and 3"):
        run(spec(model, path, id_column="id", shard=(0, 2)), STUB)


def test_too_many_rows_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.tables.table.MAX_ROWS", 5)
    files = [write(tmp_path / f"{i}.parquet", prompt=P) for i in range(2)]
    assert Table.open(files[:1]).num_rows == 3
    with pytest.raises(Refused, match=r"1\.parquet has row 6; a job has at most 5: split the input"):
        Table.open(files)


def test_ids_are_data_and_never_a_path(tmp_path: Path, model: Path) -> None:
    names = ["../../x", "/etc/passwd", "a\0b", "", "C:\\x", "."]
    path = write(tmp_path / "in.parquet", prompt=["p"] * 6, id=names)
    run(spec(model, path, id_column="id"), STUB)
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == names
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", "out.parquet", "out.run"]


def folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.tex").touch()


PLACES: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "an output that is the input": (lambda folder: (folder / "out.parquet").symlink_to("in.parquet"), 2, "is an input"),
    "an output that is a folder": (lambda folder: (folder / "out.parquet").mkdir(), 65, "is a directory"),
    "an output that is a link loop": (lambda f: (f / "out.parquet").symlink_to(f / "out.parquet"), 65, "link"),
    "a folder of others": (folder_of_others, 65, "holds files that no run wrote"),
    "a run folder that is a file": (lambda folder: (folder / "out.run").touch(), 65, "is a file"),
    "a run folder that is a link loop": (lambda f: (f / "out.run").symlink_to(f / "out.run"), 65, "out.run is a link"),
    "a run folder that is a link to nowhere": (lambda f: (f / "out.run").symlink_to("gone"), 65, "out.run is a link"),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_that_cannot_hold_the_output_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=P)
    make, exit_code, said = PLACES[what]
    make(tmp_path)
    before = sorted(os.listdir(tmp_path)), path.read_bytes()
    code, line = call(capsys, "run", path, "-o", tmp_path / "out.parquet", "--model", model)
    assert (code, said in line) == (exit_code, True), line
    assert (sorted(os.listdir(tmp_path)), path.read_bytes()) == before


def test_an_input_by_another_name_is_no_output(tmp_path: Path) -> None:
    path = write(tmp_path / "out.parquet", prompt=P)
    (tmp_path / "link.parquet").symlink_to(path)
    with pytest.raises(UsageError, match="is an input too"):
        JobSpec((tmp_path / "link.parquet",), tmp_path / "out.parquet", "m", prompt_column="prompt")


FLAGS = [
    ("temperature", ["nan", "-1", "inf", "1e9"]),
    ("max-tokens", ["0", "-1", str(2**63), "1.5"]),
    ("top-p", ["0", "nan", "1.1"]),
    ("top-k", ["-1", str(2**31)]),
    ("min-p", ["1", "nan", "-0.1"]),
    ("seed", ["-1"]),
]


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in FLAGS for value in values])
def test_sampling_out_of_bounds_is_refused_as_a_flag_and_in_the_job_file(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=P)
    common = ["run", path, "-o", tmp_path / "out.parquet", "--model", model]
    (tmp_path / "job.toml").write_text(f"{flag} = {value}\n")
    for arguments in ([f"--{flag}={value}"], ["--config", tmp_path / "job.toml"]):
        code, line = call(capsys, *common, *arguments)
        assert (code, flag in line) == (2, True), line
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", "job.toml"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("n = 1000000000", "--n is 1000000000; it must be from 1 to 128"),
        ("stop = [" + '"x",' * 10_000 + "]", "--stop is 10000 strings; it must be at most 64"),
        ('stop = ["x", ""]', "--stop is an empty string"),
        ('pattern = "("', "unknown key 'pattern'"),
    ],
)
def test_what_a_job_file_cannot_ask_for(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], key: str, said: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=P)
    (tmp_path / "job.toml").write_text(key)
    common = ["run", path, "-o", tmp_path / "out.parquet", "--model", model, "--config", tmp_path / "job.toml"]
    code, line = call(capsys, *common)
    assert (code, said in line) == (2, True), line
