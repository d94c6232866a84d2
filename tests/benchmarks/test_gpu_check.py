"""The check that is for machines with a GPU: its summaries, its processes, and all of it in Triton's interpreter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_check import processes, speed_attention, speed_products, tools
from gpu_check.ceilings import Ceilings
from gpu_check.findings import DEVICE_LOST, Findings
from gpu_check.processes import Child, Found, run_parts
from gpu_check.report import Results, markdown, stage_result
from gpu_check.session import Session
from gpu_check.stages import RUNS, Stage, run_of
from gpu_check.tools import counted
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
    folder = RUN.parent
    for gpu_run in RUNS:
        for stage in gpu_run.stages:
            for place in stage.parts.values():
                module, _, function = place.partition(":")
                assert f"def {function}(session: Session) -> None:" in (folder / f"{module}.py").read_text(), place
    assert all(len(file.read_text().splitlines()) < MOST_LINES for file in folder.glob("*.py"))
    assert not (folder / "__init__.py").exists()


def test_two_runs_take_seven_and_five_minutes() -> None:
    names = [stage.name for gpu_run in RUNS for stage in gpu_run.stages]
    assert len(set(names)) == len(names)
    for name, minutes in (("1", 7), ("2", 5)):
        gpu_run = run_of(name)
        assert gpu_run.seconds == 60 * minutes
        assert sum(stage.seconds for stage in gpu_run.stages) <= gpu_run.seconds
        ends = [gpu_run.ends(stage) for stage in gpu_run.stages]
        assert ends == sorted(ends) and ends[-1] <= gpu_run.seconds


def test_parts_share_what_there_is_to_do() -> None:
    for gpu_run in RUNS:
        for stage in gpu_run.stages:
            for place, count in Counter(stage.parts.values()).items():
                shares = [stage.share(name) for name, where in stage.parts.items() if where == place]
                assert shares == [(i, count) for i in range(count)]
    whole = [Session(True, "", 0.0, share=(i, 3)).own(range(8)) for i in range(3)]
    assert sorted(i for share in whole for i in share) == list(range(8)) and max(map(len, whole)) == 3


def test_a_part_stops_at_its_time_and_says_what_it_left_out() -> None:
    session = Session(True, "1.4 rows", time.monotonic() + 100)
    done = []
    for i in session.within_time(range(5)):
        done.append(i)
        if i == 1:
            session.until = time.monotonic()
    assert done == [0, 1] and session.stopped
    assert session.findings.notes == ["1.4 rows: 3 of 5 cases left out: out of time"]


def test_runs_have_names() -> None:
    assert [gpu_run.name for gpu_run in RUNS] == ["1", "2", "transformers", "sweep"]
    with pytest.raises(ValueError, match="--run is '7'; it must be one of 1, 2, transformers, sweep"):
        run_of("7")


def test_without_a_device_it_ends_with_one_line() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: torch ") and done.stderr.count("\n") == 1
    assert "finds no CUDA device here; --smoke runs without one" in done.stderr
    assert run("--run", "9", "--smoke").returncode == 2


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
    for status in ("not run", "stopped at its time"):
        assert stage_result("title", 1, [one, part("two", status)])["status"] == "not all of it was run"
    assert stage_result("title", 1, [one, part("two", "under way")])["status"] == "under way"
    fault = {"case": "c", "error": "E: e", "traceback": "line"}
    assert stage_result("title", 1, [one, part("two", "failed", faults=[fault])])["status"] == "failed"


def test_stages_that_run_apart_are_in_one_file(tmp_path: Path) -> None:
    aims = [{"aim": "fast", "measured": "slow", "met": False}]
    fault = {"case": "c", "error": "E: e", "traceback": "line 7"}
    Results(tmp_path).put("2.1", stage_result("third", 1.0, [part("one", aims=aims)]))
    later = Results(tmp_path)
    later.put("1.1", stage_result("first", 1.0, [part("one", "failed", faults=[fault])]))
    assert list(json.loads((tmp_path / "gpu_check.json").read_text())["stages"]) == ["1.1", "2.1"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert page == later.page()
    assert "stage 1.1, c: E: e" in later.summary()
    assert "device a device. Stages: 1.1 on today; 2.1 on today." in page
    assert "| fast | slow | no | 2.1 |" in page
    assert "| 1.1 | first | failed | 1.00 |" in page and "E: e" in page and "line 7" in page
    later.put("1.1", stage_result("first", 1.0, [part("one")]))
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
        span("cuda_runtime", "cudaEventSynchronize", 155, 30),
        span("cuda_runtime", "cudaEventSynchronize", 152, 1),  # of an event that has happened
        span("cuda_runtime", "cudaEventSynchronize", 102, 1),
        span("cuda_runtime", "cudaMemcpyAsync", 153, 1),
        span("cuda_runtime", "cudaStreamSynchronize", 154, 1),
        span("cuda_runtime", "cudaDeviceSynchronize", 250, 1),  # the profiler's own
    ]
    trace = trace_of([*steps, *device, *calls, {"ph": "M", "name": "process_name"}])
    assert (trace.steps, trace.kernels, trace.kernels_per_step) == (2, 2, 1)
    assert trace.busy_us == 60 and trace.idle_share == pytest.approx(1 - 60 / 80)
    assert (trace.launches_per_step, trace.replays_per_step, trace.event_waits_per_step) == (1, 0.5, 0.5)
    assert trace.waits == {"cudaStreamSynchronize": 1}
    with pytest.raises(ValueError, match="no kernels"):
        trace_of(steps)
    with pytest.raises(ValueError, match="no 'steady step'"):
        trace_of(device)


def test_the_last_launch_of_each_kernel_is_read_from_the_counters() -> None:
    said = """case small
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","us","%"
"0","_sum_kernel","(4, 1, 1)","7.50","12.5"
"1","_attention_kernel","(512, 8, 1)","1,240.10","30.0"
"2","_sum_kernel","(4, 1, 1)","2.25","13.5"
==PROF== Disconnected
"""
    assert counted(said) == [
        {"kernel": "_sum_kernel", "grid": "(4, 1, 1)", "time, us": 2.25, "warps, %": 13.5},
        {"kernel": "_attention_kernel", "grid": "(512, 8, 1)", "time, us": 1240.1, "warps, %": 30.0},
    ]


def test_figures_are_held_to_the_aims() -> None:
    session, ceiling = Session(True, "2.2 kernels", 0.0), Ceilings(4e12, 800e12, 1600e12, 1600e12)

    def timed(table: str, microseconds: float, rate: float, operations: float = 0.0, **columns: Any) -> None:
        session.row(table, **columns, **{"p50, us": microseconds, "GB/s": rate, "TFLOP/s": operations})

    timed(speed_attention.TITLE, 100.0, 3100.0, step="decode", by="batchinfer", cache="fp32")
    timed(speed_attention.TITLE, 62.5, 2500.0, step="decode", by="batchinfer", cache="int8")
    timed(speed_attention.TITLE, 50.0, 4000.0, step="decode", by="torch, MATH", cache="dense")
    timed(speed_attention.TITLE, 500.0, 100.0, 480.0, step="prefill", by="batchinfer", cache="fp32")
    timed(speed_products.TITLE, 10.0, 3000.0, layer="qkv", kind="w4a16", rows=16)
    timed(speed_products.TITLE, 5.0, 2000.0, layer="out", kind="w4a16", rows=16)
    timed(speed_products.TITLE, 99.0, 1.0, layer="out", kind="w4a16", rows=64)
    speed_attention.judge(session, ceiling)
    speed_products.judge(session, ceiling)
    assert [(aim["measured"], aim["met"]) for aim in session.findings.aims] == [
        ("78 %", True),  # 3.1 of 4 TB/s
        ("1.60 times", False),  # 100 us beside 62.5
        ("60 %", True),  # 480 of 800 TFLOP/s
        ("67 %", True),  # 30 and 10 MB in 15 us
    ]


@pytest.fixture
def sanitized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Session]:
    """Runs the part with a compute-sanitizer of these shell commands; without commands there is none."""

    def sanitize(commands: str) -> Session:
        if commands:
            (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / "compute-sanitizer").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) + (":/bin:/usr/bin" if commands else ""))
        session = Session(False, "1.3 memcheck", time.monotonic() + 1.5)
        with session.case("memcheck"):
            tools.run_memcheck(session)
        return session

    return sanitize


def test_a_tool_that_is_missing_or_refused_is_skipped(sanitized: Callable[[str], Session]) -> None:
    for commands, why in (
        ("", "it is not on this machine"),
        ("echo '========= Error: Device not supported'; exit 1", "it may not do its work here: ========= Error: Dev"),
    ):
        findings = sanitized(commands).findings
        assert not findings.faults and not findings.tables
        assert len(findings.notes) == 1
        assert findings.notes[0].startswith(f"compute-sanitizer, memcheck was skipped: {why}")


def test_what_a_tool_finds_is_a_fault(sanitized: Callable[[str], Session]) -> None:
    fine = sanitized("echo case one; echo case two")
    assert not fine.findings.faults
    assert fine.findings.tables[tools.CHECKED] == [{"tool": "memcheck", "cases": 2, "ended": "exit code 0"}]
    assert "after 1 cases" in sanitized("echo case one; exit 9").findings.faults[0]["error"]
    assert "no case was run" in sanitized("true").findings.faults[0]["error"]
    cut = sanitized("echo case one; sleep 60")
    assert cut.stopped and not cut.findings.faults
    assert cut.findings.tables[tools.CHECKED][0]["ended"] == "out of time"
    assert sanitized("echo '========= Invalid __global__ read of size 4'; sleep 60").findings.faults


WRITES = """
import json, sys, time
from pathlib import Path
file, part = Path(sys.argv[1]), json.loads(sys.argv[2])
found = json.loads(file.read_text()) if file.exists() else []
file.write_text(json.dumps(found + [dict(part, part=name, status=status) for name, status in {written!r}]))
{ends}
"""
SCRIPTS = {
    "a": ([("a", "ok"), ("b", "ok")], f"sys.exit({DEVICE_LOST})"),
    "c": ([], "import os; os.kill(os.getpid(), 9)"),
    "d": ([("d", "ok")], ""),
    "slow": ([("slow", "under way")], "time.sleep(60)"),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Children that write the parts of `SCRIPTS` and end as they say; the parts that each was started for."""
    begun: list[tuple[str, ...]] = []

    def start(stage: Stage, parts: tuple[str, ...], smoke: bool, file: Path, until: float, earlier: Path) -> Child:
        begun.append(parts)
        written, ends = SCRIPTS[parts[0]]
        code = WRITES.format(written=written, ends=ends)
        command = [sys.executable, "-c", code, str(file), json.dumps(part(""))]
        return Child(subprocess.Popen(command, start_new_session=True), file, parts, until)

    monkeypatch.setattr(processes, "_start", start)
    monkeypatch.setattr(processes, "LEAST", 1.0)
    return begun


def parts_of(folder: Path, seconds: float, *names: str, at_once: bool = False) -> tuple[Found, list[Found]]:
    """What was found in the end, and what there was before that."""
    stage = Stage("9.1", "a stage", seconds, dict.fromkeys(names, "nowhere:run"), at_once)
    seen: list[Found] = []
    until = time.monotonic() + seconds
    return run_parts(stage, False, folder, until, folder / "earlier.json", seen.append), seen


def test_what_is_left_of_a_process_that_died_runs_in_another(started: list[tuple[str, ...]], tmp_path: Path) -> None:
    found, _ = parts_of(tmp_path, 100, "a", "b", "c", "d")
    assert started == [("a", "b", "c", "d"), ("c", "d"), ("d",)]
    assert [(f["part"], f["status"]) for f in found] == [("a", "ok"), ("b", "ok"), ("c", "failed"), ("d", "ok")]
    assert "killed by signal 9" in found[2]["faults"][0]["error"]


def test_what_a_process_had_found_stays_when_its_time_is_over(started: list[tuple[str, ...]], tmp_path: Path) -> None:
    found, seen = parts_of(tmp_path, 4, "d", "slow", at_once=True)
    assert [(f["part"], f["status"]) for f in found] == [("d", "ok"), ("slow", "failed")]
    assert "out of time" in found[1]["faults"][0]["error"]
    assert "under way" in [f["status"] for some in seen for f in some], "results are there before the end"
    found, _ = parts_of(tmp_path, 0.5, "d")
    assert sorted(started) == [("d",), ("slow",)], "with so little time nothing is begun"
    assert found[0]["status"] == "not run" and found[0]["notes"] == ["d was not run: out of time"]


def test_a_run_that_is_ended_leaves_its_figures(tmp_path: Path) -> None:
    """Ended in the midst of its first stage, as a rented machine ends it when its time is over."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BATCHINFER_KERNELS")}
    command = [sys.executable, str(RUN), "--run", "1", "--smoke", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env={**clean, "PYTHONPATH": "."}, stdout=subprocess.DEVNULL) as process:
        page = tmp_path / "gpu_check.json"
        while not (page.exists() and json.loads(page.read_text())["stages"]["1.1"]["tables"]):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    stage = json.loads(page.read_text())["stages"]["1.1"]
    assert stage["tables"]["Kernels as they were compiled and loaded here"]


@pytest.mark.long(minutes=3)
@pytest.mark.parametrize("name", ["1", "2", "transformers", "sweep"])
def test_all_stages_run_in_the_interpreter(tmp_path: Path, name: str) -> None:
    done = run("--run", name, "--smoke", "--out", str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert list(stages) == [stage.name for stage in run_of(name).stages]
    for stage in run_of(name).stages:
        found = stages[stage.name]
        assert found["status"] == "ok" and not found["faults"], found["faults"]
        assert [p["part"] for p in found["parts"]] == list(stage.parts)
        assert found["tables"], f"stage {stage.name} has measured nothing"
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {stage.name}. {stage.title}" in page for stage in run_of(name).stages)
    assert "a smoke test, whose figures mean nothing" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]
