"""Sentences about what limited a job, on constructed runs: each figure has its sentence, and others have none."""

from dataclasses import replace
from typing import Any

import pytest
from reports import REPORT

from batchinfer.jobs.advice import advice, at_ceilings
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.report import Report
from batchinfer.jobs.row_errors import ROW_ERRORS
from batchinfer.kernels.cpu_library import REFERENCE

QUIET = replace(
    REPORT,
    rows_by_error={},
    rows_by_finish_reason={"stop": 1200},
    rows_ok=1200,
    rows_failed=0,
    wall_seconds=105.0,
    settings={"max_num_seqs": 1024, "max_model_len": 2048, "device": "cpu", "cpu_path": "avx2"},
)
"""A report in which nothing stands out: no rate of memory was measured, and products reached 43 % of the arithmetic."""
BUSY = {**REPORT.phases, "prefill": 60.0, "decode": 40.0}


def changed(**fields: Any) -> Report:
    return replace(QUIET, **fields)


def test_a_job_of_which_nothing_stands_out_has_no_advice() -> None:
    assert advice(QUIET) == []


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (changed(rows_by_error={"too_long": 1}), "1 row failed with too_long, because their prompts"),
        (changed(rows_by_finish_reason={"length": 60, "stop": 1140}), "60 rows (5 % of those with an answer) ended"),
        (changed(phases={**BUSY, "load": 70.0}, wall_seconds=170.0), "Loading the model took 0:01:10, 41 % of the"),
        (changed(peak_bytes_per_second=5e10, wall_seconds=250.0), "Generating took only 0:01:40, 40 % of the wall"),
        (changed(phases={**BUSY, "tokenize": 85.0}), "Tokenizing took 0:01:25 beside 0:01:40 of generating"),
        (changed(percent_of_peak=62.0), "The arithmetic of the device limited this job: matrix products ran at 62 %"),
        (changed(phases=BUSY, peak_bytes_per_second=5e9), "reading the weights once in each step took 68 % of"),
        (changed(phases=BUSY, peak_bytes_per_second=5e10), "Neither the arithmetic of the device (43 % of it) nor its"),
        (changed(settings={**QUIET.settings, "cpu_path": REFERENCE}), "The kernels in C were not used"),
        (changed(predicted=Forecast(90, 80, 99, 100, others={"w8a8-int8": 50, "w4a8": 40})), "--quantization w4a8"),
        (changed(preemptions=100), "100 times a row was taken back because the KV cache was full"),
        (changed(drafted=1000, accepted=90), "Only 9 % of the drafts were accepted; --speculative-config off"),
        (changed(padded_tokens=20_000), "17 % of the tokens computed were padding"),
        (changed(phases={**BUSY, "merge": 30.0}), "Writing took 30.10 s, 29 % of the wall time"),
    ],
)  # fmt: skip
def test_a_figure_that_stands_out_has_its_sentence(report: Report, said: str) -> None:
    found = advice(report)
    assert len(found) == 1 and said in found[0] and found[0].endswith(".")


@pytest.mark.parametrize(
    "report",
    [
        changed(rows_by_finish_reason={"length": 59, "stop": 1141}),
        changed(phases={**BUSY, "load": 65.0}, wall_seconds=170.0),
        changed(wall_seconds=199.0),
        changed(wall_seconds=201.0, canary=Canary(8, "org/name", 8, 1.0, 99, 1.0, 0.0, 95.0)),
        changed(predicted=Forecast(90, 80, 99, 100, others={"w8a8-int8": 95})),
        changed(drafted=1000, accepted=110),
        changed(preemptions=20),
        changed(steps=0, operations=0, percent_of_peak=None),
        changed(rows_by_error={"a_new_code": 3}),
    ],
)
def test_a_figure_that_does_not_stand_out_has_none(report: Report) -> None:
    assert advice(report) == []


def test_more_rows_side_by_side_are_named_only_where_rows_waited_for_a_place() -> None:
    limited = {"phases": BUSY, "peak_bytes_per_second": 5e10}
    few = {**QUIET.settings, "max_num_seqs": 64}
    assert "than --max-num-seqs 64 may help" in advice(changed(**limited, settings=few))[0]
    assert "--max-num-seqs" not in advice(changed(**limited))[0]
    assert "--max-num-seqs" not in advice(changed(**limited, settings=few, preemptions=1))[0]
    merged = {"shards": QUIET.rows_computed // 100, "shard_seconds": QUIET.wall_seconds}
    assert "--max-num-seqs" not in advice(changed(**limited, **merged, settings=few))[0], "100 rows in each"


def test_shares_of_the_ceilings_are_those_of_the_figures() -> None:
    operations, nbytes = at_ceilings(changed(phases=BUSY, peak_bytes_per_second=1e10, kv_bytes_read=160 * 10**9))
    assert operations == pytest.approx(0.4321) and nbytes == pytest.approx((400 * 0.85e9 + 160e9) / (100 * 1e10))


def test_every_remedy_is_a_sentence() -> None:
    for code in ROW_ERRORS:
        (said,) = advice(changed(rows_by_error={code: 2}))
        assert said.startswith(f"2 rows failed with {code}, because ") and said.endswith(".")
