"""Every flag that is declared reaches the command line, the job file, the job, the checks and the help."""

import json
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from batchinfer.engine.config import Speculation
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import UsageError
from batchinfer.flag import Flag
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.flags import FLAGS, GROUPS
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.speculation import SpeculationFlags

NEEDED = {"inputs": "in.parquet", "output": "o.parquet", "model": "m"}
SAMPLING = {field.name for field in fields(SamplingParams)}
NOT_FIELDS = {field.name for field in fields(SpeculationFlags)}
SCHEMA = '{"properties": {"a": {"type": "string"}}}'
# How each flag is written, the value that it stands for, and the flags that it needs.
WRITTEN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "shard": ("1/3", (1, 3), {}),
    "columns": ("a,b", ("a", "b"), {}),
    "csv_delimiter": (";", ";", {}),
    "csv_encoding": ("windows-1252", "cp1252", {}),
    "stop": ("END", ("END",), {}),
    "bad_words": ("never", ("never",), {}),
    **dict.fromkeys(("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"), ("3,4", (3, 4), {})),
    "time_limit": ("1:30", 90.0, {}),
    "metrics_textfile": ("x.prom", Path("x.prom"), {}),
    "system_prompt": ("Be brief.", "Be brief.", {"chat": True}),
    "tools_column": ("tools", "tools", {"chat": True}),
    "tools": ("tools.json", Path("tools.json"), {"chat": True}),
    "chat_template": ("t.jinja", Path("t.jinja"), {"chat": True}),
    "chat_template_kwargs": ('{"a": [1, null]}', {"a": [1, None]}, {"chat": True}),
    "chat_template_kwargs_column": ("kwargs", "kwargs", {"chat": True}),
    "choices": ('[" a", "b,c"]', (" a", "b,c"), {}),
    "choice_probabilities": (True, True, {"choices": "a,b"}),
    "any_model": (True, True, {"openai_batch": True}),
    "json_schema": (SCHEMA, SCHEMA, {}),
    "grammar": ("start: /a/", "start: /a/", {}),
    "output_columns": (True, True, {"json_schema": SCHEMA}),
    "canary_reference": ("other", "other", {"canary": 1}),
    "template_date": ("2026-11-28T09:30", datetime(2026, 11, 28, 9, 30), {}),
    "incremental": (True, True, {"id_column": "id"}),
    "reorder_fields": (True, True, {"prompt_template": "{a}"}),
    "resume": (False, False, {}),
    "inputs": ("other.parquet", (Path("other.parquet"),), {}),
    "reuse": ("other.parquet", (Path("other.parquet"),), {}),
    "output": ("other.parquet", Path("other.parquet"), {}),
}


def written(field: str) -> tuple[Any, Any, dict[str, Any]]:
    """A value that is not the default: as it is written, as a job has it, and the flags that it needs."""
    flag = FLAGS[field]
    if field in WRITTEN:
        return WRITTEN[field]
    if flag.choices:
        return flag.choices[1], flag.choices[1], {}
    value: Any = {bool: True, int: int(flag.at_least or 0) + 3, float: 0.5}.get(flag.type, "other")
    return value, value, {}


def arguments(values: dict[str, Any]) -> list[str]:
    """Values of fields as a command line."""
    found = []
    for field, value in values.items():
        flag = FLAGS[field]
        if flag.positional:
            found.append(value)
        elif isinstance(value, bool):
            found.append(flag.option if value else f"--no-{flag.option[2:]}")
        else:
            found += [flag.option, str(value)]
    return found


def toml(values: dict[str, Any]) -> str:
    """Values of fields as a job file."""
    text = {
        field: str(value).lower() if isinstance(value, bool | int | float) else json.dumps(value)
        for field, value in values.items()
    }
    return "\n".join(f"{FLAGS[field].name.replace('_', '-')} = {value}" for field, value in text.items())


def test_a_list_of_labels_in_a_file_keeps_spaces_and_commas(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(toml(NEEDED | {"choices": [" yes, it is", "[no"]}))
    assert job_of(["--config", str(tmp_path / "job.toml")]).choices == (" yes, it is", "[no")
    (tmp_path / "job.toml").write_text(toml(NEEDED | {"choices": "yes, no"}))
    assert job_of(["--config", str(tmp_path / "job.toml")]).choices == ("yes", "no")


def value_in(job: JobSpec, field: str) -> Any:
    return getattr(job.sampling if field in SAMPLING else job, field)


@pytest.mark.parametrize("field", sorted(FLAGS.keys() - NOT_FIELDS))
def test_a_flag_is_in_the_job_from_the_command_line_and_the_file(field: str, tmp_path: Path) -> None:
    given, value, needed = written(field)
    values = NEEDED | needed | {field: given}
    (tmp_path / "job.toml").write_text(toml(values))
    on_the_line, in_the_file = job_of(arguments(values)), job_of(["--config", str(tmp_path / "job.toml")])
    located = tmp_path / value if isinstance(value, Path) else value
    located = tuple(tmp_path / path for path in value) if field in ("inputs", "reuse") else located
    shard = "-1-of-3" if field == "shard" else ""
    assert (value_in(on_the_line, field), value_in(in_the_file, field)) == (value, located)
    assert value != value_in(job_of(arguments(NEEDED)), field)
    if field != "output":
        assert on_the_line.output == Path(f"o{shard}.parquet")


def test_speculation_is_made_of_two_flags() -> None:
    assert {"speculative_config", "draft_model"} == NOT_FIELDS
    job = job_of(arguments(NEEDED | {"speculative_config": "draft_model", "draft_model": "small"}))
    assert job.speculation == Speculation("draft_model", model=Path("small"))


def out_of_bounds(flag: Flag) -> list[Any]:
    """Values just outside of what is allowed."""
    step = 1 if flag.type is int else 0.001
    limits = [(flag.at_least, -step), (flag.above, 0), (flag.at_most, step), (flag.below, 0)]
    if flag.choices:
        return ["none such" if flag.type is str else 7]
    return [flag.type(limit + beyond) for limit, beyond in limits if limit is not None]


BOUNDED = sorted(field for field, flag in FLAGS.items() if flag.bound)


@pytest.mark.parametrize("field", BOUNDED)
def test_a_bound_holds_for_the_command_line_and_for_the_job(field: str) -> None:
    flag = FLAGS[field]
    assert out_of_bounds(flag)
    for value in out_of_bounds(flag):
        said = f"{flag.option} is {value!r}; it must be {flag.bound}"
        if flag.kind is None:
            with pytest.raises(UsageError) as refused:
                job_of([*arguments(NEEDED), f"{flag.option}={value}"])
            assert str(refused.value) == said
        with pytest.raises((UsageError, ValueError)) as refused_by_job:
            SamplingParams(**{field: value}) if field in SAMPLING else spec(**{field: value})
        assert str(refused_by_job.value) == (said.replace(flag.option, field) if field in SAMPLING else said)


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2026-11-28", datetime(2026, 11, 28)),
        ("2026-11-28T09:30", datetime(2026, 11, 28, 9, 30)),
        ("2026-11-28 09:30:15", datetime(2026, 11, 28, 9, 30, 15)),
        ("1000-01-01", datetime(1000, 1, 1)),
        ("9999-12-31", datetime(9999, 12, 31)),
    ],
)
def test_a_template_date_is_a_date_or_a_date_and_time_also_as_toml_has_them(
    written: str, moment: datetime, tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(f'input = "i"\noutput = "o.parquet"\nmodel = "m"\ntemplate-date = {written}\n')
    assert job_of(arguments(NEEDED | {"template_date": written})).template_date == moment
    if len(written) != len("2026-11-28T09:30"):  # TOML 1.0 has no time without seconds
        assert job_of(["--config", str(tmp_path / "job.toml")]).template_date == moment


@pytest.mark.parametrize(
    "written",
    [
        *("", "now", "28.11.2026", "2026-02-30", "20261-11-28", "0999-12-31", "2026-11-28T25:00", "1e9", "2026"),
        *("2026-11-28T09:30+01:00", "2026-11-28T09:30Z", "\u0662026-11-28"),
    ],
)
def test_what_is_no_date_here_is_refused(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = call(capsys, "run", *arguments(NEEDED), f"--template-date={written}")
    assert code == 2 and line.startswith(f"batchinfer: error: --template-date is {written!r}; give a date, or a date ")


def test_a_job_file_with_another_kind_of_time_is_refused(tmp_path: Path) -> None:
    for written, said in (("09:30:00", "is a time"), ("2026-11-28T09:30:00Z", "without a time zone")):
        (tmp_path / "job.toml").write_text(
            f'input = "i"\noutput = "o.parquet"\nmodel = "m"\ntemplate-date = {written}\n'
        )
        with pytest.raises(UsageError, match=said):
            job_of(["--config", str(tmp_path / "job.toml")])


def spec(**fields: Any) -> JobSpec:
    return JobSpec((Path("in.parquet"),), Path("o.parquet"), "m", **{"prompt_column": "p"} | fields)


@pytest.mark.parametrize("command", ["evaluate", "bench", "doctor"])
def test_other_commands_check_the_same(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"evaluate": ["m", "--data", "d", "--column", "c"], "bench": ["--stub"], "doctor": []}[command]
    flag = FLAGS["device" if command == "doctor" else "quantization"]
    code, line = call(capsys, command, *needed, flag.option, "none such")
    assert (code, line) == (2, f"batchinfer: error: {flag.option} is 'none such'; it must be {flag.bound}")


HELP = "import sys; from batchinfer.jobs.cli.main import main; sys.argv = ['batchinfer', 'run', '--help']"
LOADED = "import atexit; atexit.register(lambda: print(sorted({'torch', 'numpy'} & set(sys.modules))))"


def test_the_help_has_every_flag_in_its_section_and_loads_nothing_large() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{HELP}; {LOADED}; main()"], text=True, capture_output=True, check=True
    )
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    sections: dict[str, list[str]] = {}
    for line in lines:
        if line.endswith(":") and not line.startswith(" "):
            sections[line[:-1]] = []
        elif sections:
            sections[list(sections)[-1]].append(line)
    assert list(sections) == ["Options", *GROUPS]
    assert all(len(line) <= 80 for line in lines)
    for flag in FLAGS.values():
        words = "".join("".join(sections[flag.group]).split())  # a line may be broken behind a hyphen
        assert "".join(flag.help.split()) in words and flag.option in words
