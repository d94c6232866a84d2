"""The report as a file and as a table."""

import json
import resource
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from reports import REPORT

from batchinfer.errors import Refused
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.report import SCHEMA_VERSION, rates, read_report, versions
from batchinfer.jobs.results.run_folder import RunFolder

# What `report.json` promises to those who read it with other programs.
PROMISED = {
    *("rows", "rows_ok", "rows_failed", "rows_resumed", "rows_computed", "rows_duplicate", "prompt_tokens"),
    *("prompt_tokens_computed", "completion_tokens", "drafted", "accepted", "steps", "preemptions", "phases"),
    *("tokens_per_second", "peak_memory_bytes", "device", "versions", "command", "schema_version"),
}


def save(folder: Path, values: object) -> Path:
    output = folder / "out.parquet"
    run = RunFolder(output)
    run.path.mkdir()
    run.report.write_text(json.dumps(values))
    return output


def test_a_report_reads_back(tmp_path: Path) -> None:
    assert set(asdict(REPORT)) > PROMISED
    assert read_report(save(tmp_path, asdict(REPORT))) == REPORT


def test_what_was_expected_stands_beside_the_result(tmp_path: Path) -> None:
    report = replace(REPORT, predicted=Forecast(90.0, 30.0, 150.0, 98.5))
    assert read_report(save(tmp_path, asdict(report))) == report
    lines = report.table().splitlines()
    assert [line.split(None, 1)[1] for line in lines if line.startswith("predicted ")] == [
        "0:01:30 of generating without drafts (30.00 s to 0:02:30)"
    ]
    assert any("known lengths" in line and "0:01:38" in line for line in lines)
    assert "predicted" not in REPORT.table()


def test_the_table_is_aligned_and_whole() -> None:
    text = REPORT.table()
    start = text.splitlines()[0].index("out.parquet")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in text.splitlines())
    for part in (
        "1,200 (1,150 ok, 50 failed)",
        "too_long",
        "1:02:05, of which generating 0:01:40",
        "input 900.0, output 95.0, total 995.0",
        "prefill 1,500.0, decode 240.5",
        "43.2 % of 900 GOP/s",
        "parent 300 MB, engine 1.50 GB",
        "64: 300, 512: 100",
        "0.5 % of the tokens computed",
        "a slower path",
    ):
        assert part in text


def test_many_step_sizes_are_cut_to_the_most_frequent() -> None:
    sizes = {str(size): size for size in range(1, 10)}
    assert "4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 3 more sizes" in replace(REPORT, step_sizes=sizes).table()


def test_what_was_not_measured_is_not_shown() -> None:
    assert "GOP/s" not in replace(REPORT, percent_of_peak=None).table()
    assert rates({"prefill": 5}, {"prefill": 0.0}) == {"prefill": 0.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**asdict(REPORT), "schema_version": 99}, "has schema_version 99; this batchinfer reads only 1"),
        ([], "is not a report of batchinfer"),
        ({"rows": 1}, "is not a report of batchinfer"),
        ({"schema_version": SCHEMA_VERSION, "rows": 1}, "is not a report of batchinfer"),
    ],
)
def test_another_report_is_refused(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_report(save(tmp_path, values))


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["pyarrow"] == version("pyarrow")
    assert found["torch"] == version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_peak_memory_is_of_this_process() -> None:
    slack = 4_000_000  # the kernel counts pages in batches
    highest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert psutil.Process().memory_info().rss - slack <= peak_memory_bytes() <= highest + slack


def test_rows_that_got_the_result_of_another_are_said() -> None:
    assert "duplicates" not in REPORT.table()
    assert "  duplicates       7 rows\n" in replace(REPORT, rows_duplicate=7).table()


def test_what_attention_read_stands_beside_what_it_would_have_read_without_shared_prefixes() -> None:
    assert "keys and values" not in REPORT.table(), "the CPU does not count it"
    apart = replace(REPORT, kv_bytes_read=10**9, kv_bytes_unshared=10**9)
    assert "keys and values    1.00 GB read\n" in apart.table()
    shared = replace(REPORT, kv_bytes_read=1_200_000_000_000, kv_bytes_unshared=2_100_000_000_000)
    assert "keys and values    1.20 TB read, 2.10 TB without shared prefixes\n" in shared.table()


def test_the_experts_that_a_step_touched_are_said_of_mixtures() -> None:
    assert "experts" not in REPORT.table()
    assert "\n  experts " in replace(REPORT, experts_touched=61.25).table()
    assert "61.2 of a layer touched" in replace(REPORT, experts_touched=61.25).table()


def test_how_steps_ran_on_a_gpu_is_said_where_one_was_used() -> None:
    assert "replayed" not in REPORT.table()
    steps = {"replayed": 1549, "recorded": 25, "launched": 3}
    line = "  decoding         1,549 replayed, 25 recorded, 3 launched kernel by kernel\n"
    assert line in replace(REPORT, gpu_steps=steps).table()
