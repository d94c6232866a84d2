"""Speculation on the command line, in the job file, in the plan of a job and in its report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from command_line import call
from stub_jobs import CONTEXT, ENGINES, STUB, prompts, spec, write
from tokenizers.models import WordLevel

from batchinfer.engine.config import EngineStats, Speculation
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.job import run
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.speculation import speculation_of

NEEDED = ("in.parquet", "-o", "o.parquet", "--model", "m")


@pytest.fixture
def draft(tmp_path: Path, model: Path) -> Path:
    return shutil.copytree(model, tmp_path / "draft")


def change(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Speculation()),
        (["--speculative-config", "off"], Speculation("off")),
        (["--speculative-config", " ngram "], Speculation("ngram")),
        (
            [
                "--speculative-config",
                '{"method":"ngram","num_speculative_tokens":4,"prompt_lookup_min":2,"prompt_lookup_max":5}',
            ],
            Speculation("ngram", 4, None, 2, 5),
        ),
        (
            ["--speculative-config", '{"method":"draft_model","model":"DIR","num_speculative_tokens":5}'],
            Speculation("draft_model", 5, Path("DIR")),
        ),
        (["--speculative-config", '{"gate": false}'], Speculation(gate=False)),
        (["--draft-model", "org/name"], Speculation("auto", model=Path("org/name"))),
        (
            ["--speculative-config", '{"method":"draft_model","num_speculative_tokens":3}', "--draft-model", "DIR"],
            Speculation("draft_model", 3, Path("DIR")),
        ),
        (
            ["--speculative-config", "draft_model", "--draft-model", "DIR"],
            Speculation("draft_model", model=Path("DIR")),
        ),
    ],
)
def test_flags_are_read_as_other_engines_spell_them(arguments: list[str], expected: Speculation) -> None:
    assert job_of([*NEEDED, *arguments]).speculation == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"metod": "ngram"}', "unknown key 'metod'; the nearest known key is 'method'"),
        ('{"draft_model": "x"}', "unknown key 'draft_model'; the nearest known key is 'model'"),
        ('{"ngram_prompt_lookup_max": 4}', "the nearest known key is 'prompt_lookup_max'"),
        ('{"method": "draft", "model": "x"}', "method is 'draft'; batchinfer calls it 'draft_model'"),
        ("prompt_lookup", "method is 'prompt_lookup'; batchinfer calls it 'ngram'"),
        ("eagle", "method is 'eagle'; it must be one of off, auto, ngram, suffix, draft_model"),
        ('{"method": 5}', "method is '5'; it must be a text"),
        ('{"num_speculative_tokens": "4"}', "num_speculative_tokens is '4'; it must be a whole number"),
        ('{"num_speculative_tokens": true}', "num_speculative_tokens is 'True'; it must be a whole number"),
        ('{"num_speculative_tokens": 4.0}', "num_speculative_tokens is '4.0'; it must be a whole number"),
        ('{"num_speculative_tokens": 33}', "num_speculative_tokens is 33; it must be from 1 to 32"),
        ('{"gate": 1}', "gate is '1'; it must be true or false"),
        ('{"model": null}', "model is 'None'; it must be a text"),
        ('{"model": ""}', "model is ''; name a directory"),
        ('{"model": "a\\u0000b"}', "name a directory"),
        ('{"prompt_lookup_min": 6}', "prompt_lookup_min is 6 and prompt_lookup_max 5"),
        ('{"method": "draft_model"}', "there is no model; name one"),
        ('{"method": "ngram", "model": "x"}', "method 'ngram' has no use for the model 'x'"),
        ('{"method": "ngram"', "is not a JSON object: Expecting ',' delimiter"),
        ('{"method": "ngram", "method": "off"}', "it has a key twice"),
        ('{"a": ' + "[" * 100_000, "is not a JSON object"),
        ('{"num_speculative_tokens": ' + "9" * 5000 + "}", "is not a JSON object"),
        ("", "method is ''; it must be one of off"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    code, line = call(capsys, "run", *NEEDED, "--speculative-config", text)
    assert code == 2
    assert "--speculative-config" in line and said in line


def test_a_model_is_named_once() -> None:
    with pytest.raises(UsageError, match="--draft-model is 'y', and --speculative-config names a model too"):
        speculation_of('{"model": "x"}', "y")
    with pytest.raises(UsageError, match="method 'off' has no use for the model 'y'"):
        speculation_of("off", "y")


def job_file(folder: Path, text: str) -> JobSpec:
    needed = 'input = "in.parquet"\noutput = "o.parquet"\nmodel = "m"\n'
    (folder / "job.toml").write_text(needed + text)
    return job_of(["--config", str(folder / "job.toml")])


def test_a_job_file_has_a_table_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for text, expected in (
        ('speculative-config = "suffix"', Speculation("suffix")),
        ("speculative_config = '{\"gate\": false}'", Speculation(gate=False)),
        ('[speculative_config]\nmethod = "ngram"\nnum_speculative_tokens = 4', Speculation("ngram", 4)),
        ('[speculative_config]\nmodel = "small"', Speculation(model=tmp_path / "small")),
        ('[speculative_config]\nmodel = "org/small"', Speculation(model=Path("org/small"))),
        ('draft-model = "small"', Speculation(model=tmp_path / "small")),
    ):
        assert job_file(tmp_path, text).speculation == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[speculative_config]\nmethods = "ngram"', "unknown key 'methods'; the nearest known key is 'method'"),
        ("[speculative_config]\nnum_speculative_tokens = 2020-01-01", "it must be a whole number"),
        ("[speculative_config]\nmodel = [1]", "speculative_config is a list; expected one value"),
        ("speculative_config = [1]", "speculative_config is a list; expected one value"),
        ("speculative_config = 5", "method is '5'"),
    ],
)
def test_a_wrong_job_file_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        job_file(tmp_path, text)


def test_the_engine_is_told_with_the_draft_model_s_folder(tmp_path: Path, model: Path, draft: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    asked = Speculation("draft_model", 3, Path(f"{draft}/../draft"))
    job = preflight(spec(model, path, speculation=asked))
    assert job.config.speculation.model is not None and job.config.speculation.model.samefile(draft)
    assert job.config.speculation.num_speculative_tokens == 3
    assert preflight(spec(model, path, speculation=Speculation("ngram"))).config.speculation == Speculation("ngram")


LFM2 = {"model_type": "lfm2", "num_hidden_layers": 2, "full_attn_idxs": [0], "num_key_value_heads": 1}


def another_tokenizer(draft: Path) -> None:
    tokenizers.Tokenizer(WordLevel({"a": 0, "b": 1}, "a")).save(str(draft / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (another_tokenizer, "has another tokenizer than"),
        (lambda draft: (draft / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda draft: change(draft, vocab_size=100), "has vocab_size 100, but its tokenizer has"),
        (
            lambda draft: change(draft, max_position_embeddings=CONTEXT - 1),
            f"takes {CONTEXT - 1} tokens of prompt and answer, and the job up to {CONTEXT}; give --max-model-len",
        ),
        (
            lambda draft: change(
                draft, model_type="lfm2", num_hidden_layers=2, full_attn_idxs=[0], num_key_value_heads=1
            ),
            "has layers that keep a state, from which rejected drafts are not taken back yet; take one whose layers",
        ),
        (lambda draft: shutil.rmtree(draft), "no such directory"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(
    tmp_path: Path, model: Path, draft: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(draft)
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    with pytest.raises(Refused, match=said) as refused:
        preflight(spec(model, path, speculation=Speculation(model=draft)))
    assert "\n" not in str(refused.value) and str(draft) in str(refused.value)


def test_another_template_and_other_ends_of_text_are_no_other_tokenizer(
    tmp_path: Path, model: Path, draft: Path
) -> None:
    change(draft, eos_token_id=5)
    (draft / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    assert preflight(spec(model, path, speculation=Speculation(model=draft))).config.speculation.model == draft


def test_a_job_goes_on_with_other_speculation(
    tmp_path: Path, model: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "in.parquet", prompt=prompts(20))
    assert run(spec(model, path), "engines_of_the_test:Fails").rows_failed == 10
    for other in (Speculation("off"), Speculation("draft_model", 2, draft)):
        report = run(spec(model, path, speculation=other, retry_errors=True), STUB)
        assert (report.rows, report.rows_failed) == (20, 0)
    with pytest.raises(Refused, match="sampling"):
        run(spec(model, path, sampling=SamplingParams(max_tokens=7), retry_errors=True), STUB)


DRAFTING = """
from batchinfer.jobs.process.stub_engine import StubEngine

class Drafting(StubEngine):
    def stats(self):
        stats = super().stats()
        stats.drafted, stats.accepted, stats.shared_tokens = 1200, 900, 1150
        stats.kv_bytes_read, stats.kv_bytes_unshared = 3_000_000, 5_000_000
        return stats
"""


def test_drafts_and_shared_tokens_are_in_the_report(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drafting_engine.py").write_text(DRAFTING)
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    report = run(spec(model, path), "drafting_engine:Drafting")
    assert (report.drafted, report.accepted, report.prompt_tokens_shared) == (1200, 900, 1150)
    assert (report.kv_bytes_read, report.kv_bytes_unshared) == (3_000_000, 5_000_000)
    assert "1,200 drafted, 900 accepted (75.0 %)" in report.table()
    assert "3 MB read, 5 MB without shared prefixes" in report.table()
    assert f"({report.prompt_tokens_computed:,} computed, 1,150 shared)" in report.table()
    assert read_report(tmp_path / "out.parquet") == report


def test_where_nothing_was_drafted_there_is_no_line(tmp_path: Path, model: Path) -> None:
    report = run(spec(model, write(tmp_path / "in.parquet", prompt=prompts(3))), STUB)
    assert (report.drafted, EngineStats().drafted) == (0, 0)
    assert "drafts" not in report.table()
