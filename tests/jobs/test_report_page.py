"""The report as a page: its counts are those of the output, and nothing in it comes from elsewhere or can run."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from reports import REPORT
from stub_jobs import STUB, make_model, spec, write

from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.job import run
from batchinfer.jobs.report import Report
from batchinfer.jobs.report_page import PLOTTED, report_page, thinned
from batchinfer.jobs.results.glance import Answer
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.timeline import Sample

SAMPLES = [Sample(1e9 + i, 1.0, i % 5, 100, 50, 8.0, 0.25) for i in range(300)]
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Reads a page: its tags, which must be closed in order, its attributes, its text and the rows of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags, self.attributes, self.text = set[str](), dict[str, list[str]](), list[str]()
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1].append(data)


def test_the_counts_are_those_of_the_output(tmp_path: Path) -> None:
    """Long prompts are cut by their length, empty and null ones fail, equal ones are duplicates."""
    texts = [f"prompt {i}" for i in range(40)] + ["same text"] * 5 + ["x" * 300] * 3 + [None, None, ""]
    table = write(tmp_path / "in.parquet", prompt=pa.array(texts, pa.string()))
    job = spec(make_model(tmp_path), table, max_error_rate=1.0)
    run(job, STUB)
    page = Reader(RunFolder(job.output).page.read_text("utf-8"))
    output = pq.read_table(job.output)
    shown = {row[0]: row[-1] for row in page.rows if len(row) >= 2}
    for reason, count in count_values(output["finish_reason"]).items():
        assert reason == "error" or shown[reason] == f"{count:,}"
    errors = count_values(output["error_code"])
    assert set(errors) == {"too_long", "null_prompt", "empty_prompt"}
    for code, count in errors.items():
        assert shown[f"error: {code}"] == f"{count:,}"
        first = pc.indices_nonzero(pc.equal(output["error_code"], code)).to_pylist()
        assert any(f"{', '.join(map(str, first[:5]))}" in cell for row in page.rows for cell in row if "row" in cell)
    said = " ".join(page.text)
    good = output.filter(pc.is_null(output["error_code"])).num_rows
    assert f"{good} of {len(texts)} rows have an answer" in said
    tokens = [pc.sum(output[name]).as_py() for name in ("completion_tokens", "prompt_tokens")]
    assert f"{tokens[0]:,} tokens generated, {tokens[1]:,} in prompts" in said
    assert ["duplicates", "got the answer of an equal row", "4"] in page.rows


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.drop_null().value_counts().to_pylist()}


@pytest.mark.parametrize("samples", [[], SAMPLES[:1], SAMPLES[:5], SAMPLES])
@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        replace(REPORT, device="", steps=0, operations=0, percent_of_peak=None, peak_memory_bytes={"parent": 1}),
        replace(REPORT, predicted=Forecast(90.0, 50.0, 120.0, 95.0, 130.0, {"w8a8-int8": 50.0}), rows_duplicate=200,
                prompt_tokens_shared=9000, drafted=100, accepted=60, peak_bytes_per_second=2e10, ended=1_790_000_000),
        replace(REPORT, rows_ok=0, rows_failed=1200, rows_by_error={"too_long": 1200}, generate_seconds=0.0),
    ],
)  # fmt: skip
def test_a_page_is_whole_and_alone_whatever_ran(report: Report, samples: list[Sample]) -> None:
    page = report_page(report, samples)
    read = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & read.tags
    assert not {"href", "src", "onload", "onclick", "action"} & read.attributes.keys()
    assert set(re.findall(r"[a-z]+://[^\"' <)]+", page)) <= {"http://www.w3.org/2000/svg"} and "url(" not in page
    assert len(page) < 200_000


def test_nothing_that_users_name_becomes_markup() -> None:
    bad = "<script>alert(1)</script>&amp;\"'"
    report = replace(
        REPORT, output=f"/x/{bad}.parquet", model=bad, notes=[bad], command=bad, kernels={bad: bad},
        answers=[Answer(0, bad, "stop")], settings={"dtype": bad}, rows_by_error={bad: 1}, first_errors={bad: [7]},
    )  # fmt: skip
    read = Reader(report_page(report, SAMPLES))
    assert "script" not in read.tags and sum(bad in text for text in read.text) >= 6


def test_savings_are_given_in_seconds_only_where_the_device_was_measured() -> None:
    report = replace(REPORT, rows_duplicate=200, prompt_tokens_shared=9000, drafted=100, accepted=60)
    assert "that saved about" not in report_page(report, [])
    measured = replace(report, predicted=Forecast(90.0, 50.0, 120.0, 110.0, 130.0))
    said = " ".join(Reader(report_page(measured, [])).text)
    assert "9,000 were computed for another row; that saved about 20.00 s" in said
    assert "200 rows; that saved about 22.00 s" in said, "1,000 rows took 110 s"
    assert "100, of which 60 accepted (60.0 %); that saved about 10.00 s" in said


def test_a_job_without_a_model_says_nothing_of_what_was_not_done() -> None:
    report = replace(
        REPORT, rows_ok=0, rows_failed=1200, rows_by_finish_reason={"error": 1200}, rows_by_error={"too_long": 1200},
        first_errors={"too_long": [0, 1]}, device="", steps=0, operations=0, generate_seconds=0.0, wall_seconds=0.06,
        phases={**dict.fromkeys(REPORT.phases, 0.0), "tokenize": 0.013}, prompt_tokens=0, prompt_tokens_computed=0,
        completion_tokens=0, padded_tokens=0, weight_bytes=0, kv_cache_bytes=0, buckets={},
        peak_memory_bytes={"parent": 163_000_000, "engine": 0},
    )  # fmt: skip
    read = Reader(report_page(report, []))
    said = " ".join(read.text)
    assert "60 ms in all" in said and "13 ms" in said
    assert not [word for word in ("a second", "predicted", "Tokens", "decode", " 0 MB", "weights") if word in said]
    assert [row[0] for row in read.rows if "MB" in row[-1]] == ["the job's process"]
    assert ["ended by", "first of them, counted from 0", "rows"] in read.rows


def test_the_time_of_a_job_that_went_on_is_that_of_its_last_run() -> None:
    said = [" ".join(Reader(report_page(replace(REPORT, rows_resumed=rows), [])).text) for rows in (0, 9)]
    assert "1:02:05 in all, 0:01:40 of it" in said[0] and "1:02:05 in this run, 0:01:40 of it" in said[1]


def test_an_answer_keeps_its_lines() -> None:
    page = report_page(replace(REPORT, answers=[Answer(7, "\n  if x:\n    y\n", "stop")]), [])
    assert "<td>  if x:\n    y</td>" in page and "pre-wrap" in page


def test_first_rows_have_a_column_only_if_rows_failed() -> None:
    read = Reader(report_page(replace(REPORT, rows_by_error={}), []))
    assert ["ended by", "rows"] in read.rows and "counted from 0" not in " ".join(read.text)


def test_no_flag_is_broken_at_its_hyphens() -> None:
    page = report_page(replace(REPORT, command="batchinfer run -o a--b --max-tokens 5 '--x<y'"), [])
    assert '-o a--b <span class="flag">--max-tokens</span> 5 &#x27;<span class="flag">--x</span>&lt;y' in page


@pytest.mark.parametrize("count", [1, PLOTTED, PLOTTED + 1, 480])
def test_fewer_samples_are_drawn_and_none_is_left_out(count: int) -> None:
    samples = (SAMPLES * 2)[:count]
    shown = thinned(samples, PLOTTED)
    assert len(shown) <= PLOTTED and sum(s.rows for s in shown) == sum(s.rows for s in samples)
    assert sum(s.seconds for s in shown) == pytest.approx(count)
