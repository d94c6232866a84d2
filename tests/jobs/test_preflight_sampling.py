"""Sampling settings of a job: of its flags, of the checkpoint, and what the report and the fingerprints say of them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from stub_jobs import STUB, make_model, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.report import read_report

OWN = {"repetition_penalty": 1.2, "suppress_tokens": [5, 6], "temperature": 0.6, "num_beams": 4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return make_model(tmp_path / "model")


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """The same model with settings of its own."""
    copy = tmp_path / "own"
    shutil.copytree(model, copy)
    (copy / "generation_config.json").write_text(json.dumps(OWN))
    return copy


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", prompt=["one", "two"])


def digest(model: Path, table: Path, **fields: Any) -> str:
    return preflight(spec(model, table, **fields)).fingerprints["sampling"]


def test_a_job_without_such_settings_keeps_the_digest_that_it_had_before_there_were_any(
    model: Path, table: Path
) -> None:
    job = spec(model, table)
    fields = {name: getattr(job.sampling, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p")}
    fields |= {"stop": [], "ignore_eos": False, "n": 1, "seed": 0, "max_model_len": 64}
    assert digest(model, table) == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def test_what_is_applied_is_part_of_the_fingerprint(model: Path, own: Path, table: Path) -> None:
    applied, none = digest(own, table), digest(own, table, generation_config="none")
    assert none == digest(model, table) != applied
    params = SamplingParams(max_tokens=8, repetition_penalty=1.2, suppress_tokens=(5, 6))
    given = ("repetition_penalty", "suppress_tokens", "max_tokens")
    assert digest(model, table, sampling=params, sampling_given=given) == applied
    assert digest(own, table, generation_config="sampling") not in (applied, none)


def test_a_run_that_began_without_the_settings_goes_on_without_them(tmp_path: Path, own: Path, table: Path) -> None:
    run(spec(own, table, generation_config="none"), STUB)
    with pytest.raises(Refused, match="sampling"):
        run(spec(own, table), STUB)


def test_report_log_and_plan_name_what_was_applied(
    tmp_path: Path, own: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(spec(own, table), STUB)
    assert report.generation_config["applied"] == {"repetition_penalty": 1.2, "suppress_tokens": [5, 6]}
    assert report.generation_config["not_applied"] == {
        "--generation-config sampling applies it": {"temperature": 0.6},
        "there is no such setting here": {"num_beams": 4},
    }
    assert read_report(tmp_path / "out.parquet") == report
    applied = "generation_config.json: repetition_penalty 1.2, suppress_tokens [5, 6] applied"
    others = ("temperature 0.6 not applied: --generation-config", "num_beams 4 not applied: there is no such setting")
    told = capsys.readouterr().err
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = json.loads((own / "config.json").read_text()) | shape | {"num_attention_heads": 2, "rms_norm_eps": 1e-6}
    (own / "config.json").write_text(json.dumps(config))
    outlook = plan(spec(own, table, output=tmp_path / "planned.parquet"))
    for said in (applied, *others):
        assert said in told and said in report.table() and any(said in note for note in outlook.notes)


def test_a_flag_wins_over_the_checkpoint_even_with_the_default(own: Path, table: Path, tmp_path: Path) -> None:
    arguments = [str(table), "--model", str(own), "-o", str(tmp_path / "out.parquet")]
    assert preflight(job_of(arguments)).spec.sampling.repetition_penalty == 1.2
    job = preflight(job_of([*arguments, "--repetition-penalty", "1", "--suppress-tokens", "7,8"]))
    assert (job.spec.sampling.repetition_penalty, job.spec.sampling.suppress_tokens) == (1.0, (7, 8))
    assert not job.generation_config.applied
    (tmp_path / "job.toml").write_text("repetition-penalty = 1.0\nsuppress_tokens = [7, 8]\nstop-token-ids = '9,10'\n")
    same = preflight(job_of([*arguments, "--config", str(tmp_path / "job.toml")])).spec.sampling
    assert (same.repetition_penalty, same.suppress_tokens, same.stop_token_ids) == (1.0, (7, 8), (9, 10))


def test_a_stop_text_that_is_a_control_token_is_resolved(
    model: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = preflight(spec(model, table, sampling=SamplingParams(stop=("<eos>", "end"))))
    assert job.spec.sampling.stop_token_ids == (0,) and job.spec.sampling.stop == ("<eos>", "end")
    report = run(spec(model, table, sampling=SamplingParams(stop=("<eos>",))), STUB)
    said = "stop '<eos>' is a control token: answers end at its id 0"
    assert said in report.notes and said in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused(own: Path, table: Path) -> None:
    (own / "generation_config.json").write_text('{"repetition_penalty": 0}')
    with pytest.raises(Refused, match=r"repetition_penalty is 0; it must be above 0.*--generation-config none"):
        preflight(spec(own, table))
    preflight(spec(own, table, generation_config="none"))
    with pytest.raises(UsageError, match="--suppress-tokens is 99999; it must be at most"):
        preflight(spec(own, table, sampling=SamplingParams(suppress_tokens=(99999,))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suppress-tokens", "5,x"], "--suppress-tokens is 'x'; it must be token ids"),
        (["--stop-token-ids=-1"], "--stop-token-ids is '-1'; it must be token ids"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0; it must be above 0"),
        (["--presence-penalty", "3"], "--presence-penalty is 3.0; it must be from -2 to 2"),
        (["--min-tokens", "300"], "--min-tokens is 300; it must be at most --max-tokens, which is 256"),
        (["--generation-config", "vllm"], "--generation-config is 'vllm'; it must be one of auto, sampling, none"),
        (["--bad-words", ""], "--bad-words is an empty string"),
    ],
)
def test_a_flag_out_of_bounds_is_named(
    model: Path, table: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = call(capsys, "run", table, "--model", model, "-o", tmp_path / "out.parquet", *flags)
    assert code == 2 and message in said
