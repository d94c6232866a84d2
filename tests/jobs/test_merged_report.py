"""The report of merged shards: its counts are those of the merged rows, and what differs is said."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
from reports import REPORT
from stub_jobs import STUB, counts, make_model, prompts, recount, spec, write

from batchinfer.errors import Refused
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.merged_report import merged_report
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.report_comparison import Comparison
from batchinfer.jobs.report_schema import report_schema
from batchinfer.jobs.results.glance import Answer
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.timeline import read_timeline

TEXTS = [*prompts(20), None, *prompts(12), "", *prompts(5)]
SHARDS = [
    replace(REPORT, output="out-0-of-2.parquet", ended=5000, wall_seconds=100.0, command="run --shard 0/2 a.csv"),
    replace(REPORT, output="out-1-of-2.parquet", ended=5050, wall_seconds=80.0, command="run --shard 1/2 a.csv"),
]


def merged(*changes: dict[str, Any]) -> Report:
    return merged_report([replace(s, **c) for s, c in zip(SHARDS, changes, strict=True)], Path("out.parquet"), "abc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., list[Path]]:
    def shards(name: str = "out.parquet", count: int = 3, **fields: Any) -> list[Path]:
        table = write(tmp_path / "in.parquet", prompt=TEXTS)
        outputs = [sharded(tmp_path / name, i, count) for i in range(count)]
        for i, output in enumerate(outputs):
            run(spec(model, table, output=output, shard=(i, count), report_samples=2, **fields), STUB)
        return outputs

    return shards


def test_every_count_is_that_of_the_merged_rows(tmp_path: Path, make: Callable[..., list[Path]]) -> None:
    output, shards = tmp_path / "out.parquet", make()
    merge_shards(shards, output, overwrite=False)
    report, rows = read_report(output), pq.read_table(output).to_pylist()
    assert counts(report) == recount(output)
    assert {k: n for k, n in report.rows_by_finish_reason.items() if n} == Counter(row["finish_reason"] for row in rows)
    failed = [(row["error_code"], i) for i, row in enumerate(rows) if row["error_code"] is not None]
    assert [(code, i) for code, found in report.first_errors.items() for i in found] == failed
    lengths = Counter[str]()
    for longest, n in report.completion_lengths.items():
        lengths[longest] += n
    assert lengths.total() == sum(row["completion_tokens"] is not None for row in rows)
    assert sum(report.buckets.values()) == report.rows_ok
    assert report.rows_computed + report.rows_resumed + report.rows_reused == report.rows
    for answer in report.answers:
        row = rows[answer.row]
        assert (answer.text, answer.ended) == (row["generated_text"], row["error_code"] or row["finish_reason"])
    assert [answer.row for answer in report.answers] == sorted({answer.row for answer in report.answers})
    samples = read_timeline(RunFolder(output).timeline)
    assert sum(sample.rows for sample in samples) == sum(
        sample.rows for shard in shards for sample in read_timeline(RunFolder(shard).timeline)
    )
    assert json.loads(RunFolder(shards[0]).report.read_text())["shards"] == report.shards - 3 == 0
    jsonschema.validate(json.loads(RunFolder(output).report.read_text()), report_schema())
    assert "out.parquet: report" in RunFolder(output).page.read_text()


def test_wall_time_is_that_of_machines_side_by_side() -> None:
    report = merged({}, {})
    assert (report.wall_seconds, report.shard_seconds, report.machine_seconds) == (150.0, 180.0, 180.0)
    assert (report.generate_seconds, report.phases["prefill"], report.ended) == (200.0, 120.0, 5050)
    assert report.rows_per_second == 2400 / 150
    rate = report.tokens_per_second
    assert rate["total"] == pytest.approx(2 * 995.0 * 100 / 150) and rate["prefill"] == pytest.approx(1500.0)
    lines = report.table().splitlines()
    assert "wall time          0:02:30, from the first shard's start to the last one's end" in lines
    assert "time of shards     0:03:00, of which generating 0:03:20" in lines


def test_what_cannot_be_added_is_kept_or_said() -> None:
    same = merged({}, {})
    assert (same.device, same.versions, same.kernels, same.notes) == (
        REPORT.device, REPORT.versions, REPORT.kernels, REPORT.notes,
    )  # fmt: skip
    assert same.command == "run --shard I/2 a.csv"
    other = merged(
        {"device": "cpu A", "settings": {"max_num_seqs": 8}},
        {"device": "cpu B", "versions": {"batchinfer": "0.2"}, "notes": ["a slower path", "odd"], "settings": {}},
    )
    assert other.device == "cpu A in shard 0, cpu B in shard 1"
    assert other.versions == {"batchinfer": "0.1.0 in shard 0, 0.2 in shard 1"}
    assert other.notes == ["a slower path", "shard 1: odd"] and other.settings == {"max_num_seqs": 8}
    assert merged({"device": "", "kernels": {}, "steps": 0}, {}).device == REPORT.device


def test_ceilings_are_means_over_the_time_of_the_engines() -> None:
    slow = {"prefill": 100.0, "decode": 99.0, **{name: 0.0 for name in ("load", "tokenize", "commit", "merge")}}
    report = merged({}, {"phases": slow, "peak_operations_per_second": 3e11})
    assert report.peak_operations_per_second == pytest.approx((99.5 * 9e11 + 199 * 3e11) / 298.5)
    assert report.percent_of_peak == pytest.approx(100 * 2e12 / (99.5 * 9e11 + 199 * 3e11))
    assert "measured arithmetic of the shards: 300 GOP/s to 900 GOP/s; this report has the mean" in report.notes
    assert merged({}, {"peak_operations_per_second": 0.0}).percent_of_peak is None


def test_predictions_and_canaries_add_up_where_they_are_known() -> None:
    told = Forecast(90.0, 30.0, 150.0, 98.5, 120.0, {"w8a8-int8": 50.0, "w4a8": 40.0})
    both = merged({"predicted": told}, {"predicted": replace(told, others={"w8a8-int8": 60.0})}).predicted
    assert both == Forecast(180.0, 60.0, 300.0, 197.0, 240.0, {"w8a8-int8": 110.0})
    alone = merged({"predicted": told}, {})
    assert alone.predicted is None and "no time is predicted" in alone.notes[-1]
    canary = Canary(4, "org/name", 4, 1.0, 100, 1.0, 0.0, 2.0)
    report = merged({"canary": canary}, {"canary": replace(canary, rows=12, identical=6, prefix=0.5, tokens=300)})
    assert report.canary == Canary(16, "org/name", 10, 0.625, 400, 1.0, 0.0, 4.0)
    assert merged({"canary": canary}, {"canary": replace(canary, reference="x")}).canary is None


def test_rows_are_numbered_over_the_whole_table() -> None:
    report = merged(
        {"first_errors": {"too_long": [3, 9, 11, 40]}, "answers": [Answer(0, "a", "stop"), Answer(600, "b", "stop")]},
        {"first_errors": {"null_prompt": [0], "too_long": [1, 2]}, "answers": [Answer(5, "c", "stop")]},
    )
    assert report.first_errors == {"too_long": [3, 9, 11, 40, 1201], "null_prompt": [1200]}
    assert [(answer.row, answer.text) for answer in report.answers] == [(0, "a"), (600, "b")]


def test_it_is_compared_like_any_other() -> None:
    figures = Comparison(SHARDS[0], merged({}, {})).json()["figures"]
    assert figures["rows"] == [1200, 2400] and figures["time of shards"] == [0.0, 180.0]


def test_shards_of_earlier_versions_have_no_time() -> None:
    with pytest.raises(Refused, match=r"report of out-1-of-2\.parquet does not say when it ended"):
        merged({}, {"ended": 0})


@pytest.mark.parametrize("damage", [None, "{", '{"schema_version": 9}'])
def test_without_the_report_of_a_shard_the_rows_are_merged(
    tmp_path: Path, make: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str], damage: str | None
) -> None:
    output, shards = tmp_path / "out.parquet", make()
    assert merge_shards(shards, output, overwrite=False) == len(TEXTS)
    whole = pq.read_table(output)
    capsys.readouterr()
    RunFolder(shards[1]).report.unlink()
    if damage is not None:
        RunFolder(shards[1]).report.write_text(damage)
    assert merge_shards(shards, output, overwrite=True) == len(TEXTS)
    said = capsys.readouterr().err
    assert "out.parquet are whole, but no report of them is written: report " in said and "out-1-of-3.run" in said
    assert pq.read_table(output).equals(whole)
    with pytest.raises(Refused, match="report"):
        read_report(output)


def test_a_damaged_timeline_is_left_out_and_said(tmp_path: Path, make: Callable[..., list[Path]]) -> None:
    shards = make()
    RunFolder(shards[2]).timeline.write_text("{")
    merge_shards(shards, tmp_path / "out.parquet", overwrite=False)
    assert "the figures over time are without out-2-of-3.parquet" in read_report(tmp_path / "out.parquet").notes[-1]


def test_a_folder_gets_its_card(tmp_path: Path, make: Callable[..., list[Path]]) -> None:
    merge_shards(make("out"), tmp_path / "out", overwrite=False)
    card = RunFolder(tmp_path / "out").card.read_text("utf-8")
    ok = read_report(tmp_path / "out").rows_ok
    assert "pretty_name: out\n" in card and f"| rows with an answer | {ok} |" in card and "max_tokens 8" in card


def test_runs_and_merges_do_not_take_each_other_for_their_own(
    tmp_path: Path, model: Path, make: Callable[..., list[Path]]
) -> None:
    output, shards = tmp_path / "out.parquet", make()
    merge_shards(shards, output, overwrite=False)
    job = spec(model, tmp_path / "in.parquet", output=output)
    with pytest.raises(Refused, match="exists; choose another one, or give --overwrite"):
        run(job, STUB)
    output.unlink()
    assert run(job, STUB).shards == 0
    assert sum(sample.rows for sample in read_timeline(RunFolder(output).timeline)) <= len(TEXTS)
    merge_shards(shards, output, overwrite=True)
    assert not RunFolder(output).parts.exists() and read_report(output).shards == 3
    assert run(replace(job, overwrite=True), STUB).rows == len(TEXTS)
    output.unlink()
    with pytest.raises(Refused, match="holds rows of a run that is not complete"):
        merge_shards(shards, output, overwrite=True)
    assert RunFolder(output).parts.exists()


def test_asdict_of_a_merged_report_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out.parquet")
    folder.path.mkdir()
    folder.report.write_text(json.dumps(asdict(merged({}, {}))))
    assert read_report(folder.output) == merged({}, {})
