"""What changed between two reports, in all forms."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reports import REPORT
from stub_jobs import STUB, make_model, prompts, spec, write

from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.report_comparison import FIGURES, Comparison
from batchinfer.jobs.report_forms import printed_comparison, printed_report

FASTER = replace(
    REPORT,
    output="other.parquet",
    wall_seconds=1862.5,
    rows_failed=0,
    drafted=100,
    kernels={"linear": "avx2"},
    settings={"max_num_seqs": 128},
    notes=["another path"],
)
OUTPUTS = ("first", "out.parquet"), ("second", "other.parquet")


def test_the_same_job_has_changed_nothing() -> None:
    text = Comparison(REPORT, REPORT).text().splitlines()
    assert all(line.split()[-1] == "1.00" for line in text[1:])


def test_what_changed_is_shown_with_its_ratio() -> None:
    lines = {line[:20].strip(): line.split() for line in Comparison(REPORT, FASTER).text().splitlines()}
    assert lines["wall time"][-3:] == ["1:02:05", "0:31:02", "0.50"]
    assert lines["rows failed"][-3:] == ["50", "0", "gone"] and lines["drafted"][-3:] == ["0", "100", "new"]
    assert lines["kernel linear"][-2:] == ["cpu", "avx2"] and lines["max_num_seqs"][-1] == "128"
    assert {"- a slower path", "+ another path"} <= lines.keys() and "model" not in lines and "steps" in lines


def test_json_has_the_figures_as_they_are() -> None:
    found = Comparison(REPORT, FASTER).json()
    assert found["figures"]["wall time"] == [3725.0, 1862.5] and len(found["figures"]) == len(FIGURES)
    assert found["changed"]["kernel linear"] == ["cpu", "avx2"]
    assert (found["only_first"], found["only_second"]) == (["a slower path"], ["another path"])


def test_the_page_has_both_outputs_and_every_ratio() -> None:
    page = Comparison(REPORT, FASTER).page()
    assert "out.parquet and other.parquet" in page and '<td class="number">0.50</td>' in page
    named = [page.index(f'<th scope="row">{name}</th><td>{output}</td>') for name, output in OUTPUTS]
    assert named == sorted(named) and "<td>max_num_seqs</td><td></td><td>128</td></tr>" in page
    assert "<script" not in page and page.count("batchinfer run") == 2


def test_reports_of_jobs_are_read_and_printed_in_all_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path)
    outputs = []
    for name, rows in (("a", 9), ("b", 20)):
        folder = tmp_path / name
        folder.mkdir()
        job = spec(model, write(folder / "in.parquet", prompt=prompts(rows)))
        outputs.append(job.output)
        run(job, STUB)
    assert json.loads(printed_report(outputs[0], "json"))["rows"] == 9
    assert printed_report(outputs[0], "html").startswith("<!DOCTYPE html>")
    assert printed_report(outputs[0], "text").startswith("output")
    assert json.loads(printed_comparison(*outputs, "json"))["figures"]["rows"] == [9, 20]
    assert printed_comparison(*outputs, "html").startswith("<!DOCTYPE html>")
    assert "2.22" in printed_comparison(*outputs, "text")
    (tmp_path / "a" / "out.run" / "timeline.json").write_text("{")
    capsys.readouterr()
    assert "Over time" not in printed_report(outputs[0], "html"), "the page is of use without"
    assert "timeline.json is damaged" in capsys.readouterr().err
    with pytest.raises(Refused, match=r"no job has begun at .*none\.parquet: there is no .*none\.run"):
        printed_report(tmp_path / "none.parquet", "text")
