"""Lines of a run as JSON: every line of stderr is an object, whose figures are those of the report."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stub_jobs import STUB, make_model, prompts, write

from batchinfer.jobs import job, log, progress
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.launch.ray_tasks import _last_line
from batchinfer.jobs.log import asked_for, message_of, say, say_error, write_as
from batchinfer.jobs.results.run_folder import RunFolder

TEXTS = [*prompts(30), None]


@dataclass
class Said:
    """What a command printed: its code, the objects on stderr, and stdout."""

    code: int
    lines: list[dict[str, Any]]
    out: str

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


@pytest.fixture(autouse=True)
def _text_again() -> Iterator[None]:
    yield
    write_as("text")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`command(*arguments)` runs a job over `TEXTS` in this process; each line of stderr must be an object."""
    table, model = write(tmp_path / "in.parquet", prompt=TEXTS), make_model(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-4)  # lines that a job of minutes has
    real = job.run

    def called(*arguments: Any, only: bool = False) -> Said:
        usual = [] if only else ["run", table, "-o", tmp_path / "out.parquet", "--model", model]
        monkeypatch.setattr(sys, "argv", ["batchinfer", *map(str, [*usual, *arguments])])
        monkeypatch.setattr(job, "run", partial(real, engine=STUB))
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        lines = [json.loads(line) for line in printed.err.splitlines()]
        for line in lines:
            assert datetime.fromisoformat(line["time"]).tzinfo is not None
            assert line["level"] in ("info", "warning", "error") and line["event"] and line["message"]
        assert not any(text in printed.err + printed.out for text in TEXTS if text is not None)
        return Said(int(ended.value.code or 0), lines, printed.out)

    return called


def test_a_whole_run(tmp_path: Path, command: Callable[..., Said]) -> None:
    said = command("--log-format", "json", "--report-samples", "5")
    report = json.loads(RunFolder(tmp_path / "out.parquet").report.read_text())
    assert said.code == 0 and not said.out
    assert len(report["answers"]) == 5
    assert said.lines[-1]["event"] == "report" and said.lines[-1]["report"] == {**report, "answers": []}
    assert said.of("loading")
    merging = said.of("merging")
    assert (merging[-1]["rows_done"], merging[-1]["rows_total"]) == (report["rows"], report["rows"])


def test_a_run_that_goes_on_and_one_that_was_complete(tmp_path: Path, command: Callable[..., Said]) -> None:
    assert command("--commit-rows", "8", "--log-format=json").code == 0
    output = tmp_path / "out.parquet"
    output.unlink()
    parts = sorted(RunFolder(output).parts.iterdir())
    parts[-1].unlink()
    said = command("--commit-rows", "8", "--log-format=json")
    report = said.lines[-1]["report"]
    assert report == {**json.loads(RunFolder(output).report.read_text()), "answers": []}
    assert (report["rows"], report["rows_resumed"] > 0) == (len(TEXTS), len(parts) > 1)
    again = command("--log-format=json")
    assert again.of("complete") and again.lines[-1]["report"] == report


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-such-flag"], 2, "no-such-flag"),
        (["--max-tokens", "many"], 2, "--max-tokens is 'many'"),
        (["--prompt-column", "absent"], 65, "absent"),
        (["--commit-rows", "0"], 2, "--commit-rows"),
        (["--output", "out.xyz"], 2, "out.xyz"),
    ],
)
def test_a_refused_run(command: Callable[..., Said], arguments: list[str], code: int, message: str) -> None:
    said = command("--log-format", "json", *arguments)
    last = said.lines[-1]
    assert (said.code, last["exit_code"], last["level"], last["event"]) == (code, code, "error", "error")
    assert message in last["message"] and not said.out


def test_a_run_of_which_every_row_failed(tmp_path: Path, command: Callable[..., Said]) -> None:
    empty = write(tmp_path / "empty.parquet", prompt=["", ""])
    said = command("run", empty, "-o", tmp_path / "e.parquet", "--model", tmp_path, "--log-format=json", only=True)
    assert [line["event"] for line in said.lines[-2:]] == ["report", "error"]
    assert said.lines[-2]["report"]["rows_failed"] == 2 and said.lines[-1]["exit_code"] == said.code == 65


def test_a_job_file_may_ask_for_it(tmp_path: Path, command: Callable[..., Said]) -> None:
    (tmp_path / "job.toml").write_text('log-format = "json"\n')
    assert command("--config", tmp_path / "job.toml").lines[-1]["event"] == "report"
    (tmp_path / "job.toml").write_text('log-format = "json"\ncommit-rows = 0\n')
    assert command("--config", tmp_path / "job.toml").lines[-1]["exit_code"] == 2


def test_text_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    say("a note", "loading", model="m")
    say_error("it\nfailed", 65)
    assert capsys.readouterr().err == "batchinfer: a note\nbatchinfer: error: it\\nfailed\n"
    assert log.FORMATS[0] == "text"


def test_odd_characters_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_as("json")
    say("a\nb\udcff\x1b", path=Path("a"))
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "a\nb\udcff\x1b" and json.loads(line)["path"] == "a"


@pytest.mark.parametrize("written_as", ["text", "json"])
def test_the_message_of_an_error_is_told_from_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written_as: str
) -> None:
    write_as(written_as)
    say("loading")
    say_error("it failed", 65)
    (tmp_path / "shard.log").write_text(capsys.readouterr().err)
    assert _last_line(tmp_path / "shard.log") == "it failed"
    assert message_of("17") == "17" and message_of("{}") == "{}"


def test_a_command_line_asks_for_it_in_two_ways() -> None:
    assert asked_for(["run", "--log-format", "json"]) == asked_for(["--log-format=json"]) == "json"
    assert asked_for(["json", "--log-format", "text"]) == asked_for([]) == "text"
