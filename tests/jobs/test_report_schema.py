"""The published schema of `report.json`: that of the code, and one that real reports fit."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import jsonschema
import pytest
from reports import REPORT
from repository import ROOT
from stub_jobs import STUB, make_model, prompts, spec, write

from batchinfer.jobs.canary import Canary
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.job import run
from batchinfer.jobs.report import Report
from batchinfer.jobs.report_schema import report_schema
from batchinfer.jobs.results.glance import Answer
from batchinfer.jobs.results.run_folder import RunFolder

PUBLISHED = ROOT / "docs" / "report.schema.json"
FULL = replace(
    REPORT,
    canary=Canary(5, "org/name", 4, 0.9, 100, 0.99, 0.001, 2.5),
    predicted=Forecast(1.0, 0.5, 2.0, 1.5, 2.5, {"w8a8-int8": 1.0}),
    answers=[Answer(0, None, "too_long"), Answer(7, "text", "stop")],
    percent_of_peak=None,
    first_errors={"too_long": [1, 2]},
    settings={"dtype": "auto", "speculation": {"method": "auto"}},
)


def test_the_published_schema_is_that_of_the_code() -> None:
    """After a change: make reference"""
    assert json.loads(PUBLISHED.read_text("utf-8")) == report_schema()
    jsonschema.Draft202012Validator.check_schema(report_schema())


def test_every_field_is_described() -> None:
    assert set(report_schema()["properties"]) == {field.name for field in fields(Report)}


@pytest.mark.parametrize("report", [REPORT, FULL])
def test_reports_fit(report: Report) -> None:
    jsonschema.validate(json.loads(json.dumps(asdict(report))), report_schema())


def test_the_report_of_a_job_fits(tmp_path: Path) -> None:
    job = spec(make_model(tmp_path), write(tmp_path / "in.parquet", prompt=prompts(9)), report_samples=2)
    run(job, STUB)
    found = json.loads(RunFolder(job.output).report.read_text("utf-8"))
    jsonschema.validate(found, json.loads(PUBLISHED.read_text("utf-8")))
    assert len(found["answers"]) == 2


@pytest.mark.parametrize(
    "changes",
    [{"rows": "9"}, {"schema_version": 2}, {"phases": {"load": None}}, {"answers": [{"row": 1}]}, {"canary": {}}],
)
def test_what_is_no_report_does_not_fit(changes: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**asdict(REPORT), **changes}, report_schema())
