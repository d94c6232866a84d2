"""`batchinfer plan` by the real command line: what a table holds, and how long the job will take."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from measured_devices import SHAPE, cost_of
from stub_jobs import make_model, spec

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.formats.compressed_tensors_writer import quantization_config
from batchinfer.formats.scheme import weight_scheme
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.plan.device_file import DeviceKey, write_device_cost
from batchinfer.jobs.plan.histogram import bars
from batchinfer.jobs.plan.prediction import Job, JobShape, Setting
from batchinfer.jobs.report import Forecast, read_report
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path

BY_TORCH = {"device": "cpu", "cpu_path": "reference"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape and a tokenizer, no weights; and a cache of measured devices that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "model").mkdir()
    return make_model(folder, **SHAPE)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    texts = ["x" * 10, None, "x" * 20, "", "x" * 500, "x" * 30, "x" * 501]
    pq.write_table(pa.table({"id": range(len(texts)), "prompt": texts}), path)
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchinfer", "plan", "--cpu-path", "reference", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return printed.out


def test_rows_lengths_and_what_cannot_run(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = planned(capsys, table, "--model", model, "--max-tokens", 20, "--json", tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["rows"], written["rows_to_run"]) == (7, 3)
    assert written["rows_failing"] == {
        "too_long": {"rows": 2, "first": 4},
        "null_prompt": {"rows": 1, "first": 1},
        "empty_prompt": {"rows": 1, "first": 3},
    }
    assert written["prompt_tokens"] == 60 and written["longest_prompt"] == 30
    assert written["most_new_tokens"] == 60
    # Three rows in blocks of 32 tokens: keys and values, of 2 layers and 2 heads with 16 numbers of 2 bytes each.
    assert written["kv_cache_bytes"] == (1 + 2 + 2) * 32 * 2 * 2 * 2 * 16 * 2
    assert written["prediction"] is None and written["comparison"] is None
    assert "doctor --calibrate" in out and "too_long" in out and "first row 4" in out
    assert out.splitlines()[-1].startswith("1-32  3  ####")
    assert not (tmp_path / "out.parquet").exists() and not list(tmp_path.glob("*.run"))


def test_a_measured_device_has_times_and_candidates(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    arguments = (table, "--model", model, "--device", "cpu", "--max-tokens", 20, "--ignore-eos")
    out = planned(capsys, *arguments, "--json", tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    prediction = written["prediction"]
    # 60 prompt tokens in one step of 64, then 19 steps of 3 sequences, padded to 8.
    assert prediction["generate_seconds"] == pytest.approx(1e-3 * (64 + 19 * 8))
    assert prediction["low"] == prediction["high"] == prediction["generate_seconds"]
    assert (prediction["start_seconds"], written["products"], written["kv_cache"]) == (2.0, "bfloat16", "bfloat16")
    best, worst = written["comparison"]["candidates"][0], written["comparison"]["candidates"][-1]
    assert best["products"] == "w8a8-int8" and best["generate_seconds"] == pytest.approx(5e-4 * (64 + 19 * 8))
    assert (worst["products"], worst["kv_cache"]) == ("bfloat16", "int8")
    assert "predicted" in out and "<- this job" in out and "calibrate" not in out


def test_unknown_lengths_give_a_range(model: Path) -> None:
    config = EngineConfig(model, max_model_len=1100)
    shape = JobShape(np.bincount(np.full(100, 20)), SamplingParams(max_tokens=1000), 1100)
    found = Job(shape, config).predict(cost_of(model), Setting("bfloat16", "bfloat16"))
    assert found.low < 0.7 * found.generate_seconds < 0.5 * found.high
    short = Job(replace(shape, sampling=SamplingParams(max_tokens=40)), config)
    cut = short.predict(cost_of(model), Setting("bfloat16", "bfloat16"))
    assert cut.low < 0.9 * cut.high < cut.generate_seconds <= cut.high, "few answers end before 40 tokens"
    exact = replace(shape, sampling=SamplingParams(max_tokens=1000, ignore_eos=True))
    same = Job(exact, config).predict(cost_of(model), Setting("bfloat16", "bfloat16"))
    assert same.low == same.generate_seconds == same.high == found.high
    job = Job(shape, config)
    known = job.seconds(job.steps_for({40: 100}), cost_of(model), Setting("bfloat16", "bfloat16"))
    assert known == pytest.approx(cut.high)


def test_what_was_not_measured_is_not_predicted(model: Path) -> None:
    cost = cost_of(model)
    lengths = np.bincount(np.full(10, 20))
    drawn = Job(JobShape(lengths, SamplingParams(temperature=1.0), 64), EngineConfig(model))
    greedy = Job(JobShape(lengths, SamplingParams(), 64), EngineConfig(model))
    setting = Setting("bfloat16", "bfloat16")
    assert greedy.measured(cost, setting) and not drawn.measured(cost, setting)  # noise alone is not in it, filters are
    assert not greedy.measured(cost, Setting("bfloat16", "float16"))
    assert not greedy.measured(cost, Setting("w8a8-fp8", "bfloat16"))


def test_a_sample_stands_for_the_whole_job(model: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.bincount(rng.integers(1, 200, 12_000))
    config = EngineConfig(model, max_model_len=1024)
    sampling = SamplingParams(max_tokens=50)
    job = Job(JobShape(lengths, sampling, 1024), config)
    sampled = job.predict(cost_of(model), Setting("bfloat16", "bfloat16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchinfer.jobs.plan.prediction.SAMPLE_ROWS", 1 << 20)
        whole = Job(job.shape, config).predict(cost_of(model), Setting("bfloat16", "bfloat16"))
    assert sampled.generate_seconds == pytest.approx(whole.generate_seconds, rel=0.04)
    assert sampled.high == pytest.approx(whole.high, rel=0.04)


@pytest.mark.parametrize(
    ("flags", "products", "kv_cache"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({"quantization": "w8a8-int8+head"}, "w8a8-int8", "float32"),
        ({"quantization": "w4a8"}, "w4a8", "float32"),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, "float32", "int8"),
        ({"quantization": "w8a8-fp8"}, "w8a8-fp8", "auto"),
    ],
)
def test_settings_are_as_the_engine_takes_them(
    model: Path, flags: dict[str, str], products: str, kv_cache: str
) -> None:
    assert Setting.of(EngineConfig(model, **flags)) == Setting(products, kv_cache)  # type: ignore[arg-type]


@pytest.mark.parametrize(("scheme", "products"), [("w4a8", "w4a8"), ("w8a8-int8", "w8a8-int8"), ("w4a16", "bfloat16")])
def test_a_checkpoint_made_for_8_bit_inputs_runs_with_them(model: Path, scheme: str, products: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = quantization_config(weight_scheme(scheme, None), ["lm_head"])
    (model / "config.json").write_text(json.dumps(config))
    assert Setting.of(EngineConfig(model)).products == products


@pytest.mark.parametrize(("quantization", "grains"), [("w8a8-int8+head", (1, 1)), ("w4a8", (1, 8)), ("none", (8, 8))])
def test_steps_are_padded_where_products_ask_for_that(model: Path, quantization: str, grains: tuple[int, int]) -> None:
    job = Job(JobShape(np.array([0, 1]), SamplingParams(), 64), EngineConfig(model, quantization=quantization))
    assert job.grains == (grains if cpu_path() != REFERENCE else (8, 8))


def test_the_report_has_what_was_to_be_expected(model: Path, table: Path, tmp_path: Path) -> None:
    """Behind the real engine; without figures of the device there is nothing to say."""
    job = spec(model, table, random_weights=True, **BY_TORCH, sampling=SamplingParams(max_tokens=20, ignore_eos=True))
    assert run(job).predicted is None
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    report = run(replace(job, overwrite=True))
    seconds = pytest.approx(1e-3 * (64 + 19 * 8))
    half = pytest.approx(5e-4 * (64 + 19 * 8))
    others = {"w8a8-int8": half}  # and no 4 bits: the checkpoint has none
    assert report.predicted == Forecast(*[seconds] * 5, others)  # type: ignore[arg-type]
    assert read_report(job.output) == report


def test_what_an_earlier_run_has_done_is_left_out(model: Path, table: Path) -> None:
    """Its last part is gone, and the output: those rows are to run again."""
    job = spec(model, table, random_weights=True, **BY_TORCH, commit_rows=3, sampling=SamplingParams(max_tokens=4))
    run(job)
    parts = sorted((job.output.with_suffix(".run") / "parts").iterdir())
    rows = len(pq.read_table(parts[-1]))
    assert len(parts) > 1 and plan(job).rows_done == 7
    parts[-1].unlink()
    job.output.unlink()
    found = plan(job)
    assert (found.rows_done, found.rows_to_run) == (7 - rows, rows)
    assert re.search(rf"done before +{7 - rows}\n", found.text(None))
    assert f"7; {rows} of them left to run" in found.text(None)
    assert plan(replace(job, overwrite=True)).rows_done == 0
    with pytest.raises(Refused, match="was begun with another sampling"):
        plan(replace(job, sampling=SamplingParams(max_tokens=5)))


def test_errors_are_those_of_a_run(model: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "plan", table, "--model", model, "--max-tokens", 0) == (
        2, "batchinfer: error: --max-tokens is 0; it must be from 1 to 2147483647",
    )  # fmt: skip
    code, said = call(capsys, "plan", table, "--model", model, "--prompt-column", "none")
    assert code == 65 and "none" in said
    code, said = call(capsys, "plan", table, "--model", model, "--no-such-flag")
    assert code == 2 and "--no-such-flag" in said
    (model / "config.json").write_text('{"max_position_embeddings": 64, "model_type": "other"}')
    code, said = call(capsys, "plan", table, "--model", model)
    assert code == 65 and "model_type" in said


def test_a_table_without_rows_that_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"prompt": pa.array([None, None], pa.string())}), path)
    out = planned(capsys, path, "--model", model)
    assert "2; 0 of them can run" in out and "prompt lengths" not in out


def test_no_torch_is_loaded(model: Path, table: Path) -> None:
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    code = (
        "import sys\nfrom batchinfer.jobs.cli.main import app\n"
        f"app(['plan', {str(table)!r}, '--model', {str(model)!r}, '--cpu-path', 'reference'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_bars_fill_their_width() -> None:
    counts = {"1-32": 1000, "33-64": 505, "65-128": 1, "129-256": 0}
    lines = bars(counts, 40)
    assert max(map(len, lines)) <= 40
    assert [line.count("█") for line in lines] == [24, 12, 0, 0]
    assert lines[1].endswith("▏") and lines[2].endswith("1") and lines[3].endswith("0")
    plain = bars(counts, None)
    assert plain[0].count("#") == 64 and all(line.isascii() for line in plain)
    assert bars({}, 40) == []
