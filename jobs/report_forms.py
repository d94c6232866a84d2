"""The forms of a report: the files in its run folder, and what `batchinfer report` prints of one report or of two."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchinfer.errors import Refused
from batchinfer.jobs.log import say
from batchinfer.jobs.report import Report, read_report, report_folder
from batchinfer.jobs.report_comparison import Comparison
from batchinfer.jobs.report_page import report_page
from batchinfer.jobs.results.durable import write_json, write_whole
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.timeline import Sample, read_timeline


def write_report(folder: RunFolder, report: Report, samples: Sequence[Sample]) -> None:
    """Write `report.json` and `report.html`; `samples` are those of the job's timeline. Raises `OSError`."""
    write_json(folder.report, asdict(report))
    write_whole(folder.page, report_page(report, samples).encode())


def printed_report(output: Path, written_as: str) -> str:
    """Return the report of a job as text, json or html. Raises `Refused` if there is none."""
    report = read_report(output)
    if written_as == "json":
        return _json(asdict(report))
    return report_page(report, _samples(output)) if written_as == "html" else report.table()


def printed_comparison(first: Path, second: Path, written_as: str) -> str:
    """Return what changed from the first job to the second, as text, json or html. Raises `Refused` as above."""
    comparison = Comparison(read_report(first), read_report(second))
    if written_as == "json":
        return _json(comparison.json())
    return comparison.page() if written_as == "html" else comparison.text()


def _samples(output: Path) -> list[Sample]:
    """Return the job's timeline; none, which is said, if it is damaged, because the page is of use without."""
    try:
        return read_timeline(report_folder(output).timeline)
    except Refused as error:
        say(f"{error}; the page has no figures over time")
        return []


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)
