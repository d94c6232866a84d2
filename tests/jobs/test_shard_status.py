"""`batchinfer status` of a job of shards: totals, and each shard's state in one table."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from beats import BEAT
from command_line import call
from stub_jobs import STUB, make_model, prompts, spec, write

from batchinfer.host.process_name import ProcessName
from batchinfer.jobs.heartbeat import Beat
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.pulse import Pulse
from batchinfer.jobs.report import read_report
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.shard_status import ShardsStatus, Total, read_shards
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.status import Status, print_status

RUNNING = replace(BEAT, tokens_per_second=1000.0, time_left=TimeLeft(300.0, 250.0, 400.0))
SLOW = replace(RUNNING, rows_per_second=0.5, time_left=TimeLeft(1500.0, 200.0, None), rows_by_error={"too_long": 3})
DEAD = replace(RUNNING, process=replace(ProcessName.own(), started=1))
STOPPED = replace(RUNNING, exit_code=75, error="stopped after 250 of 1,000 rows")


@pytest.fixture
def beats(tmp_path: Path) -> Callable[..., list[Path]]:
    """`beats(*beats)`: the outputs of shards whose last beats these are; None has not begun."""

    def make(*of: Beat | None) -> list[Path]:
        outputs = [sharded(tmp_path / "out.parquet", i, len(of)) for i in range(len(of))]
        for output, beat in zip(outputs, of, strict=True):
            if beat is not None:
                RunFolder(output).path.mkdir(exist_ok=True)
                (RunFolder(output).path / "run.json").write_text("{}")
                RunFolder(output).heartbeat.write_text(json.dumps(asdict(replace(beat, written=time.time()))))
        return outputs

    return make


def read(outputs: list[Path]) -> ShardsStatus:
    return read_shards({output: Pulse() for output in outputs})


def test_shards_in_all_states_add_up(beats: Callable[..., list[Path]]) -> None:
    status = read(beats(RUNNING, SLOW, DEAD, STOPPED, None))
    total = status.total
    assert [shard.state for shard in status.shards] == ["running", "running", "dead", "stopped", "not begun"]
    assert (total.state, total.shards) == ("running", {"running": 2, "dead": 1, "stopped": 1, "not begun": 1})
    assert (total.rows, total.rows_done, total.rows_failed) == (4000, 1000, 12)
    assert total.rows_by_error == {"too_long": 9, "null_prompt": 3}
    assert (total.rows_per_second, total.tokens_per_second) == (3.0, 2000.0), "only two run"
    assert total.time_left == TimeLeft(1500.0, 250.0, None)
    assert not status.over and json.loads(status.json()) == json.loads(json.dumps(asdict(status)))
    lines = status.text().splitlines()
    assert lines[:2] == [
        "shards         5: 2 running, 1 dead, 1 stopped, 1 not begun",
        "rows           1,000 of 4,000, and those of shards whose input is not read yet (1), 12 failed",
    ]
    assert "time left      0:25:00 (0:04:10 or more)" in lines
    table = lines[lines.index("") + 1 :]
    assert " ".join(table[1].split()) == ("out-0-of-5.parquet running 250 of 1,000 3 2.50 0:05:00 (0:04:10 to 0:06:40)")
    assert "is gone; the same command goes on where it was" in table[3] and table[3].split()[1] == "dead"
    assert table[4].endswith("stopped after 250 of 1,000 rows; exit code 75")
    assert table[5].split() == ["out-4-of-5.parquet", "not", "begun"]


@pytest.mark.parametrize(
    ("states", "whole", "over"),
    [
        (["complete", "complete"], "complete", True),
        (["complete", "not begun"], "not begun", False),
        (["complete", "dead"], "dead", True),
        (["stopped", "running"], "running", False),
    ],
)
def test_the_state_of_the_whole(states: list[str], whole: str, over: bool) -> None:
    shards = [Status("out", state, "") for state in states]
    assert Total.of(shards).state == whole
    assert ShardsStatus(Total.of(shards), shards).over == over


def test_time_left_is_unknown_while_a_shard_loads(beats: Callable[..., list[Path]]) -> None:
    loading = replace(RUNNING, phase="loading", rows_per_second=None, tokens_per_second=None, time_left=None)
    status = read(beats(RUNNING, loading))
    assert status.total.time_left is None and "unknown until a row has ended" in status.text()
    assert "running, loading" in status.text()
    merging = read(beats(RUNNING, replace(loading, phase="merging")))
    assert merging.total.time_left == RUNNING.time_left


def test_complete_shards_and_the_merged_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beats: Callable[..., list[Path]]
) -> None:
    model = make_model(tmp_path)
    table = write(tmp_path / "in.parquet", prompt=[*prompts(20), None])
    output = tmp_path / "out.parquet"
    shards = [sharded(output, i, 2) for i in range(2)]
    for i in range(2):
        run(spec(model, table, output=shards[i], shard=(i, 2)), STUB)
    total = read(shards).total
    assert (total.state, total.rows, total.rows_done, total.rows_by_error) == ("complete", 21, 21, {"null_prompt": 1})
    assert total.rows_per_second is None, "none runs"
    capsys.readouterr()
    for given in ([output], shards, [tmp_path / "out-*-of-2.parquet"]):
        printed = told(capsys, "status", *given, "--json", "--watch")
        assert [shard["output"] for shard in printed["shards"]] == [str(shard) for shard in shards]
    assert told(capsys, "status", shards[0], "--json") == json.loads(one(capsys, shards[0]))
    merge_shards(shards, output, overwrite=False)
    alone = told(capsys, "status", output, "--json")
    assert (alone["state"], alone["rows"]) == ("complete", 21) and read_report(output).rows == 21


def one(capsys: pytest.CaptureFixture[str], output: Path) -> str:
    print_status(output, False, True)
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    from batchinfer.jobs.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["batchinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


def test_rubbish_is_refused_or_shown_as_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "status", tmp_path / "a.parquet", tmp_path / "b.parquet") == (0, "")
    code, said = call(capsys, "status", tmp_path / "x-*.parquet")
    assert code == 65 and "no job has begun" in said
    folder = RunFolder(tmp_path / "a.parquet").path
    folder.mkdir()
    (folder / "heartbeat.json").write_text("{")
    (folder / "run.json").write_text("{}")
    assert read([tmp_path / "a.parquet", tmp_path / "b.parquet"]).total.shards == {"unknown": 1, "not begun": 1}
