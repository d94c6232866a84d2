"""Job files of any content: a job, or one line that says what is wrong with the file."""

from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import UsageError
from batchinfer.jobs.cli.main import app
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.spec import JobSpec

KEYS = sorted(
    {str(parameter.name) for parameter in typer.main.get_command(app).commands["run"].params}  # type: ignore[attr-defined]
    - {"inputs", "config", "help"}
    | {"input"}
)
NEEDED = ("input", "output", "model")
FUZZED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FEW, MANY = settings(FUZZED, max_examples=150), settings(FUZZED, max_examples=5_000)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "",
        "auto",
        "1/2",
        "-1/3",
        "9" * 30,
        "1:30",
        "nan",
        "-1",
        "a,b",
        "../../x",
        "/dev/null",
        "o.parquet",
        "\0",
        "{x}",
        "{",
    ]
)
NUMBERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 10**30, 10**400]) | st.floats()
PLAIN = TEXT | NUMBERS | st.booleans() | st.datetimes().map(lambda t: t.replace(tzinfo=None))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=5
)
TABLES = st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUES, max_size=5)


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
        case int() | float():
            return str(value)
        case _:
            return str(value.isoformat())


def job_or_error(path: Path) -> JobSpec | None:
    """The job, or None where one line says what is wrong; any other error is raised."""
    try:
        return job_of(["--config", str(path)])
    except UsageError as error:
        said = str(error)
    except typer.TyperException as error:
        said = error.format_message()
    assert said
    return None


def fuzz_values(path: Path) -> Any:
    needed = {"input": "in.parquet", "output": "o.parquet", "model": "m"}

    def fuzz(table: dict[str, Any]) -> None:
        lines = [f"{toml(key)} = {toml(value)}" for key, value in {**needed, **table}.items()]
        path.write_text("\n".join(lines), "utf-8")
        job = job_or_error(path)
        assert job is None or (job.inputs and job.output.suffix in (".parquet", ""))

    return fuzz


def fuzz_bytes(path: Path) -> Any:
    def fuzz(data: bytes) -> None:
        path.write_bytes(data)
        job_or_error(path)

    return fuzz


RAW = st.binary(max_size=60) | st.text("=[]{}.\"'#\n\\u0123456789_-abc\0", max_size=60).map(str.encode)


def test_any_values_make_a_job_or_an_error(tmp_path: Path) -> None:
    FEW(given(TABLES)(fuzz_values(tmp_path / "job.toml")))()


def test_any_bytes_make_a_job_or_an_error(tmp_path: Path) -> None:
    FEW(given(RAW)(fuzz_bytes(tmp_path / "job.toml")))()


@pytest.mark.long
def test_many_values_make_a_job_or_an_error(tmp_path: Path) -> None:
    MANY(given(TABLES)(fuzz_values(tmp_path / "job.toml")))()


@pytest.mark.long
def test_many_bytes_make_a_job_or_an_error(tmp_path: Path) -> None:
    MANY(given(RAW)(fuzz_bytes(tmp_path / "job.toml")))()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 100_000, "is not valid TOML"),
        ("max_tokens = " + "9" * 5000, "is not valid TOML"),
        (f"seed = {'9' * 5000}", "is not valid TOML"),
        ('model = "a\\u0000b"', "model"),
        ('input = "a\\u0000b"', "input"),
        ('stop = ["a", "\\u0000"]', "stop is a text with a NUL character"),
        ('tokenizer = "' + "x" * 5000 + '"', "--output is missing"),
    ],
)
def test_job_files_beyond_all_reason(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        job_of(["--config", str(tmp_path / "job.toml")])
