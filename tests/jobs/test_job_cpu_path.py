"""A job's rows come from one path of the CPU's kernels."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from compiled import paths
from stub_jobs import make_model, prompts, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path, why_reference


@pytest.mark.parametrize("path", paths())
def test_a_job_goes_on_with_the_path_that_it_began_with(tmp_path: Path, path: str) -> None:
    model = make_model(tmp_path)
    table = write(tmp_path / "in.parquet", prompt=prompts(6))
    for begun, other in ((REFERENCE, path), (path, REFERENCE)):
        output = tmp_path / f"{begun}.parquet"
        job = {"random_weights": True, "output": output, "device": "cpu"}
        report = run(spec(model, table, cpu_path=begun, **job))
        assert report.kernels.get("attention", REFERENCE) == begun
        with pytest.raises(Refused, match=rf"was begun with another cpu_path \(--cpu-path {begun}\);"):
            run(spec(model, table, cpu_path=other, **job))
        assert run(spec(model, table, cpu_path=begun, **job)).rows == report.rows == pq.read_metadata(output).num_rows


def test_a_path_that_does_not_run_here_is_refused_before_any_row(tmp_path: Path) -> None:
    foreign = next(path for path in ("neon", "avx2") if path not in paths())
    table = write(tmp_path / "in.parquet", prompt=prompts(6))
    with pytest.raises(UsageError, match=rf"--cpu-path is '{foreign}', and .*; take '"):
        run(spec(make_model(tmp_path), table, device="cpu", cpu_path=foreign))
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("asked", ["reference", "triton"])
def test_a_job_without_kernels_in_c_because_the_environment_asks_for_that(
    tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", asked)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cpu_path() == REFERENCE and why_reference() == f"BATCHINFER_KERNELS is '{asked}'"
    table = write(tmp_path / "in.parquet", prompt=prompts(2))
    short = SamplingParams(max_tokens=2)
    report = run(spec(make_model(tmp_path), table, random_weights=True, device="cpu", sampling=short))
    assert report.rows == 2 and not set(report.kernels.values()) & set(paths())


def test_an_unknown_value_in_the_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", "fast")
    table = write(tmp_path / "in.parquet", prompt=prompts(2))
    with pytest.raises(UsageError, match=r"^BATCHINFER_KERNELS is 'fast'; it must be one of auto, reference"):
        run(spec(make_model(tmp_path), table, device="cpu"))
