"""The check that is for machines with a GPU: its summaries, its processes, and all of it in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_check import processes
from gpu_check.findings import DEVICE_LOST, Findings
from gpu_check.processes import Child, run_parts
from gpu_check.report import Results, markdown, stage_result
from gpu_check.stages import STAGES, Stage, stages_of
from gpu_check.traces import STEP, trace_of
from repository import ROOT

RUN = ROOT / "benchmarks" / "gpu_check" / "run.py"
MOST_LINES = 300


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BATCHINFER_KERNELS")}
    return subprocess.run(
        [sys.executable, str(RUN), *arguments],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": ".", **environment},
        capture_output=True,
        text=True,
    )


def test_every_part_is_there_and_no_file_is_long() -> None:
    assert [stage.number for stage in STAGES] == [1, 2, 3, 4, 5, 6]
    folder = RUN.parent
    for stage in STAGES:
        for place in stage.parts.values():
            module, _, function = place.partition(":")
            assert f"def {function}(session: Session) -> None:" in (folder / f"{module}.py").read_text(), place
    assert all(len(file.read_text().splitlines()) < MOST_LINES for file in folder.glob("*.py"))
    assert not (folder / "__init__.py").exists()


def test_stages_are_named_by_numbers() -> None:
    assert [stage.number for stage in stages_of("3, 1,3")] == [3, 1]
    assert stages_of("") == list(STAGES)
    with pytest.raises(ValueError, match="--stages has 7, x; there are 1, 2, 3, 4, 5, 6"):
        stages_of("1,7,x")


def test_without_a_device_it_ends_with_one_line() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: torch ") and done.stderr.count("\n") == 1
    assert "finds no CUDA device here; --smoke runs without one" in done.stderr
    assert run("--stages", "9", "--smoke").returncode == 2


def test_what_goes_wrong_in_a_case_is_kept_and_the_rest_goes_on() -> None:
    findings = Findings()
    with findings.case("one"):
        raise ValueError("too long")
    with findings.case("two"):
        findings.row("a table", x=1)
    assert findings.tables == {"a table": [{"x": 1}]}
    assert [(f["case"], f["error"]) for f in findings.faults] == [("one", "ValueError: too long")]
    assert "raise ValueError" in findings.faults[0]["traceback"]


def part(name: str, status: str = "ok", **found: Any) -> dict[str, Any]:
    ran = {"device": "a device", "date": "today"}
    return {"part": name, "status": status, "seconds": 1.0, "conditions": ran, **{**Findings().as_dict(), **found}}


def test_parts_are_put_together() -> None:
    one = part("one", tables={"t": [{"x": 1}]}, notes=["n"])
    two = part("two", tables={"t": [{"x": 2}], "u": [{"y": 3}]}, aims=[{"aim": "a", "measured": "b", "met": False}])
    stage = stage_result("title", 2.04, [one, two])
    assert (stage["status"], stage["seconds"], stage["conditions"]["device"]) == ("ok", 2.0, "a device")
    assert stage["tables"] == {"t": [{"x": 1}, {"x": 2}], "u": [{"y": 3}]}
    assert stage_result("title", 1, [one, part("two", "not run")])["status"] == "not all of it was run"
    fault = {"case": "c", "error": "E: e", "traceback": "line"}
    assert stage_result("title", 1, [one, part("two", "failed", faults=[fault])])["status"] == "failed"


def test_stages_that_run_apart_are_in_one_file(tmp_path: Path) -> None:
    aims = [{"aim": "fast", "measured": "slow", "met": False}]
    fault = {"case": "c", "error": "E: e", "traceback": "line 7"}
    Results(tmp_path).put(3, stage_result("third", 1.0, [part("one", aims=aims)]))
    later = Results(tmp_path)
    later.put(1, stage_result("first", 1.0, [part("one", "failed", faults=[fault])]))
    assert list(json.loads((tmp_path / "gpu_check.json").read_text())["stages"]) == ["1", "3"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert page == later.page()
    assert "stage 1, c: E: e" in later.summary()
    assert "device a device. Stages: 1 on today; 3 on today." in page
    assert "| fast | slow | no | 3 |" in page
    assert "| 1 | first | failed | 1.00 |" in page and "E: e" in page and "line 7" in page
    later.put(1, stage_result("first", 1.0, [part("one")]))
    assert "line 7" not in later.page()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_tables_have_the_columns_of_all_rows_and_numbers_that_can_be_read() -> None:
    rows = [{"a": "x|y", "b": 0.00012}, {"b": 12345.6, "c": 1234}, {"b": float("nan"), "c": None}, {"b": 12.345}]
    assert markdown(rows) == [
        "| a | b | c |",
        "|---|---:|---:|",
        "| x\\|y | 1.2e-04 |  |",
        "|  | 12,346 | 1,234 |",
        "|  | nan |  |",
        "|  | 12.35 |  |",
    ]


def span(cat: str, name: str, start: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


def test_a_trace_tells_idle_time_launches_and_waits() -> None:
    steps = [span("user_annotation", STEP, 100, 50), span("user_annotation", STEP, 150, 50)]
    device = [
        span("kernel", "before", 0, 99),
        span("kernel", "a", 110, 20),
        span("gpu_memcpy", "copy", 120, 20),  # half of it beside a
        span("kernel", "b", 160, 30),
        span("kernel", "after", 300, 10),
    ]
    calls = [
        span("cuda_runtime", "cudaLaunchKernel", 101, 1),
        span("cuda_driver", "cuLaunchKernelEx", 103, 1),
        span("cuda_runtime", "cudaGraphLaunch", 151, 1),
        span("cuda_runtime", "cudaEventSynchronize", 152, 1),
        span("cuda_runtime", "cudaEventSynchronize", 102, 1),
        span("cuda_runtime", "cudaMemcpyAsync", 153, 1),
        span("cuda_runtime", "cudaStreamSynchronize", 154, 1),
        span("cuda_runtime", "cudaDeviceSynchronize", 250, 1),  # the profiler's own
    ]
    trace = trace_of([*steps, *device, *calls, {"ph": "M", "name": "process_name"}])
    assert (trace.steps, trace.kernels, trace.kernels_per_step) == (2, 2, 1)
    assert trace.busy_us == 60 and trace.idle_share == pytest.approx(1 - 60 / 80)
    assert (trace.launches_per_step, trace.replays_per_step, trace.event_waits_per_step) == (1, 0.5, 1)
    assert trace.waits == {"cudaStreamSynchronize": 1}
    with pytest.raises(ValueError, match="no kernels"):
        trace_of(steps)
    with pytest.raises(ValueError, match="no 'steady step'"):
        trace_of(device)


WRITES = """
import json, sys
from pathlib import Path
file, part = Path(sys.argv[1]), json.loads(sys.argv[2])
found = json.loads(file.read_text()) if file.exists() else []
file.write_text(json.dumps(found + [dict(part, part=name) for name in {written!r}]))
{ends}
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Children that write the parts of `SCRIPTS` and end as they say; the parts that each was started for."""
    begun: list[tuple[str, ...]] = []

    def start(stage: Stage, parts: tuple[str, ...], smoke: bool, file: Path, until: float) -> Child:
        begun.append(parts)
        written, ends = SCRIPTS[parts[0]]
        code = WRITES.format(written=written, ends=ends)
        command = [sys.executable, "-c", code, str(file), json.dumps(part(""))]
        return Child(subprocess.Popen(command, start_new_session=True), file, parts, until)

    monkeypatch.setattr(processes, "_start", start)
    return begun


SCRIPTS = {
    "a": (["a", "b"], f"sys.exit({DEVICE_LOST})"),
    "c": ([], "import os; os.kill(os.getpid(), 9)"),
    "d": (["d"], ""),
    "slow": ([], "import time; time.sleep(60)"),
}


def stage_of(how: str, *names: str) -> Stage:
    return Stage(9, "a stage", dict.fromkeys(names, "nowhere:run"), how)


def test_what_is_left_of_a_process_that_died_runs_in_another(started: list[tuple[str, ...]], tmp_path: Path) -> None:
    found = run_parts(stage_of("together", "a", "b", "c", "d"), False, tmp_path, 100)
    assert started == [("a", "b", "c", "d"), ("c", "d"), ("d",)]
    assert [(f["part"], f["status"]) for f in found] == [("a", "ok"), ("b", "ok"), ("c", "failed"), ("d", "ok")]
    assert "killed by signal 9" in found[2]["faults"][0]["error"]


def test_a_process_is_ended_when_its_time_is_over(started: list[tuple[str, ...]], tmp_path: Path) -> None:
    found = run_parts(stage_of("at once", "d", "slow"), False, tmp_path, 3)
    assert [(f["part"], f["status"]) for f in found] == [("d", "ok"), ("slow", "failed")]
    assert "out of time" in found[1]["faults"][0]["error"]
    found = run_parts(stage_of("apart", "d"), False, tmp_path, 3)
    assert started == [("d",), ("slow",)], "with so little time nothing is begun"
    assert found[0]["status"] == "not run" and found[0]["notes"] == ["d was not run: out of time"]


@pytest.mark.long(minutes=2)
def test_all_stages_run_in_the_interpreter(tmp_path: Path) -> None:
    done = run("--smoke", "--out", str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert list(stages) == [str(stage.number) for stage in STAGES]
    for stage in STAGES:
        found = stages[str(stage.number)]
        assert found["status"] == "ok" and not found["faults"], found["faults"]
        assert [p["part"] for p in found["parts"]] == list(stage.parts)
        assert found["tables"], f"stage {stage.number} has measured nothing"
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {stage.number}. {stage.title}" in page for stage in STAGES)
    assert "skipped: no device" in page and "a smoke test, whose figures mean nothing" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]
