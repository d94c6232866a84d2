"""The command line as its users meet it: exit codes, one line an error, the job file, no torch in the parent."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from stub_jobs import SHAPE
from tokenizers import decoders, models, pre_tokenizers

from batchinfer import __version__
from batchinfer.errors import Refused
from batchinfer.jobs import job
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.spec import JobSpec
from batchinfer.models import hub

STUB = "batchinfer.jobs.process.stub_engine:StubEngine"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and config.json, no weights."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 256}))
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "prompt": ["first", "second"]}), path)
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "run", partial(job.run, engine=STUB))


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[JobSpec]:
    """The specs that reach the runner, which refuses them."""
    specs: list[JobSpec] = []

    def refuse(spec: JobSpec) -> None:
        specs.append(spec)
        raise Refused("looked at")

    monkeypatch.setattr(job, "run", refuse)
    return specs


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """(exit code, the only line on stderr)."""
    code, out, err = call(capsys, *arguments)
    lines = [line for line in err.splitlines() if "batchinfer: loading " not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("batchinfer: error: ")
    assert not out
    return code, lines[0].removeprefix("batchinfer: error: ")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"batchinfer {__version__}\n", "")
    for arguments in ([], ["--help"], ["run", "--help"], ["bench", "--help"]):
        code, out, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        assert "Usage: batchinfer" in out


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_another_system_than_linux_is_refused_by_name(system: str) -> None:
    """Without the modules and functions that it lacks."""
    code = f"""
import os, platform, sys
platform.system = lambda: {system!r}
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.sched_getaffinity
import batchinfer.jobs.cli.main
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (65, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"batchinfer: error: this system is {system}; batchinfer runs on Linux only")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "rnu"),
        (["run", "--no-such-flag"], "--no-such-flag"),
        (["run", "IN", "-o", "o.parquet"], "--model is missing"),
        (["run", "IN", "--model", "m"], "--output is missing"),
        (["run", "-o", "o.parquet", "--model", "m"], "no input"),
        (["run", "IN", "-o", "o.csv", "--model", "m"], "must end in .parquet or .jsonl, or have no suffix"),
        (["run", "IN", "-o", "o.jsonl", "--model", "m", "--csv-delimiter", ";;"], "--csv-delimiter is ';;'; give one"),
        (["run", "IN", "-o", "o.jsonl", "--model", "m", "--csv-delimiter", ";"], "no input ends in .csv; leave it out"),
        (["run", "IN", "--max-tokens", "many"], "--max-tokens is 'many'; it must be a whole number, from 1 to"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--max-tokens", "0"], "--max-tokens is 0; it must be from 1"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--temperature", "nan"], "--temperature is nan"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--top-p", "2"], "--top-p is 2.0; it must be above 0"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--max-model-len", "lots"], "--max-model-len is 'lots'"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--quantization", "w2"], "--quantization is 'w2'"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--prompt-template", "{a"], "--prompt-template"),
        (["run", "--config", "none.toml"], "none.toml: No such file"),
        (["bench"], "--model, or --stub"),
        (["bench", "--stub", "--input-len", "0"], "--input-len is 0; it must be 1 or more"),
        (["bench", "--stub", "--dtype", "int4"], "--dtype is 'int4'"),
    ],
)
def test_a_bad_flag_exits_2(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, arguments: list[str], message: str
) -> None:
    named = [{"IN": str(table), "m": str(model)}.get(argument, argument) for argument in arguments]
    code, line = error_of(capsys, *named)
    assert code == 2
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.parquet", "-o", "o.parquet", "--model", "m"], "nowhere.parquet"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--prompt-column", "text"], "no column 'text'"),
        (["run", "IN", "-o", "o.parquet", "--model", "/no/model"], "model /no/model: no such directory"),
        (["run", "IN", "-o", "o.parquet", "--model", "IN"], "is a file; expected a directory"),
        (["run", "IN", "-o", "o.parquet", "--model", "m", "--revision", "main"], "--revision main is for Hub ids"),
        (["report", "nowhere.parquet"], "no job has begun at nowhere.parquet"),
        (["fetch", "not a/name"], "neither a directory nor the name of a Hub model"),
    ],
)
def test_what_is_refused_exits_65(
    capsys: pytest.CaptureFixture[str],
    table: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(table.parent)
    named = [{"IN": str(table), "m": str(model)}.get(argument, argument) for argument in arguments]
    code, line = error_of(capsys, *named)
    assert code == 65
    assert message in line
    assert sorted(path.name for path in table.parent.iterdir()) == ["in.parquet"]


def test_a_model_whose_config_cannot_be_read_is_refused(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, tmp_path: Path, stub: None
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    out = tmp_path / "o.parquet"
    no_length = json.dumps({key: 256 for key in (*SHAPE, "vocab_size")} | {"model_type": "llama", "head_dim": 2})
    no_length = no_length.replace("max_position_embeddings", "max_length")
    for config, message in (
        ("[]", "holds a list"),
        ("{", "is not JSON"),
        ("{}", "model_type is None; supported are"),
        (no_length, "config.json has no max_position_embeddings"),
    ):
        (other / "config.json").write_text(config)
        code, line = error_of(capsys, "run", table, "-o", out, "--model", other, "--max-model-len", "32")
        assert (code, message in line) == (65, True)


def test_a_hub_model_that_cannot_be_had_names_the_remedy(
    capsys: pytest.CaptureFixture[str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, line = error_of(capsys, "run", table, "-o", tmp_path / "o.parquet", "--model", "org/name")
    assert code == 65
    assert "'batchinfer fetch org/name' on a machine with internet" in line


def test_a_hub_model_in_the_cache_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert hub.resolve_model("org/name", None) == snapshot


def test_a_job_from_end_to_end(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, tmp_path: Path, stub: None
) -> None:
    out = tmp_path / "deep" / "o.parquet"
    code, printed, _ = call(capsys, "run", table, "-o", out, "--model", model, "--max-tokens", 3, "--columns", "id")
    assert code == 0
    assert pq.read_table(out).select(["id", "generated_text"]).to_pylist() == [
        {"id": "a", "generated_text": "fir"},
        {"id": "b", "generated_text": "sec"},
    ]
    assert call(capsys, "report", out) == (0, printed, "")
    code, found, _ = call(capsys, "report", out, "--format", "json")
    assert code == 0 and json.loads(found)["rows_ok"] == 2
    code, found, _ = call(capsys, "report", out, out)
    assert code == 0 and found.splitlines()[1].split() == ["rows", "2", "2", "1.00"]
    code, _, said = call(capsys, "report", out, out, out)
    assert code == 2 and "report compares two outputs, and 3 are given; name one or two" in said
    code, _, said = call(capsys, "report", out, "--format", "pdf")
    assert code == 2 and "--format is 'pdf'; it must be one of text, json, html" in said
    run_json = json.loads((tmp_path / "deep" / "o.run" / "run.json").read_text())
    assert run_json["spec"]["sampling"]["max_tokens"] == 3
    assert "run" in run_json["command"]


def test_every_row_failed_exits_65_with_an_output(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, stub: None
) -> None:
    pq.write_table(pa.table({"prompt": ["", None]}), tmp_path / "in.parquet")
    code, _, err = call(capsys, "run", tmp_path / "in.parquet", "-o", tmp_path / "o.parquet", "--model", model)
    assert code == 65
    assert "every row failed, 1 of 2 with empty_prompt (leave them out with --where); " in err
    assert pq.read_table(tmp_path / "o.parquet")["error_code"].to_pylist() == ["empty_prompt", "null_prompt"]


def test_a_bug_gives_one_line_and_a_log(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spec: JobSpec) -> None:
        raise KeyError("surprise\nin two lines")

    monkeypatch.setattr(job, "run", broken)
    code, line = error_of(capsys, "run", table, "-o", table.parent / "o.parquet", "--model", model)
    assert code == 70
    log = Path(line.rsplit(" ", 1)[1])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_names_with_control_characters_stay_on_one_line(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, tmp_path: Path, stub: None
) -> None:
    odd = tmp_path / "no\x1b[31m\nsuch\r\u202e"
    code, line = error_of(capsys, "run", odd, "-o", tmp_path / "o.parquet", "--model", model)
    assert (code, r"no\x1b[31m\nsuch\r\u202e" in line) == (65, True)
    out, linked = tmp_path / "o\nbatchinfer: error: forged.parquet", tmp_path / "a\x07 model"
    linked.symlink_to(model)
    assert call(capsys, "run", table, "-o", out, "--model", linked)[0] == 0
    code, printed, err = call(capsys, "run", table, "-o", out, "--model", linked)
    assert code == 0
    assert err.count("\n") == 1 and err.endswith(
        r"o\nbatchinfer: error: forged.parquet is complete already; nothing is run" + "\n"
    )
    assert r"a\x07 model" in printed and all(c.isprintable() for c in printed.replace("\n", ""))


def test_a_disk_that_is_full_exits_74(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(spec: JobSpec) -> None:
        raise OSError(28, "No space left on device", "/x/part-000001.parquet")

    monkeypatch.setattr(job, "run", full)
    code, line = error_of(capsys, "run", table, "-o", table.parent / "o.parquet", "--model", model)
    assert (code, line) == (74, "No space left on device: /x/part-000001.parquet")


def test_the_command_line_wins_over_the_job_file(
    capsys: pytest.CaptureFixture[str], resolved: list[JobSpec], tmp_path: Path
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        'input = ["a.parquet", "b.jsonl"]\noutput = "o.parquet"\nmodel = "org/name"\nprompt-column = "text"\n'
        'metrics-textfile = "x/job.prom"\n'
        'max_tokens = 7\ntemperature = 0.5\nstop = ["X", "Y"]\nignore-eos = true\nmax-model-len = 100\n'
    )
    call(capsys, "run", "--config", job)
    call(
        capsys, "run", "c.csv", "--config", job, "--max-tokens", 9, "--stop", "Z", "--no-ignore-eos", "-o", "p.parquet"
    )
    first, second = resolved
    assert first.inputs == (tmp_path / "a.parquet", tmp_path / "b.jsonl")
    assert (first.output, first.model, first.prompt_column) == (tmp_path / "o.parquet", "org/name", "text")
    assert (first.sampling.max_tokens, first.sampling.temperature, first.sampling.stop) == (7, 0.5, ("X", "Y"))
    assert (first.sampling.ignore_eos, first.max_model_len) == (True, 100)
    assert first.metrics_textfile == tmp_path / "x" / "job.prom"
    assert (second.inputs, second.output) == ((Path("c.csv"),), Path("p.parquet"))
    assert (second.sampling.max_tokens, second.sampling.stop, second.sampling.ignore_eos) == (9, ("Z",), False)
    assert second.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max-tokenz = 5", "unknown key 'max-tokenz'; the nearest known key is 'max_tokens'"),
        ("config = 'job.toml'", "unknown key 'config'"),
        ("max-tokens = 'many'", "--max-tokens is 'many'; it must be a whole number, from 1 to"),
        ("max-tokens = 1.5", "--max-tokens is 1.5; it must be a whole number, from 1 to"),
        ("chat = 'perhaps'", "'--chat': Input should be a valid boolean"),
    ],
)
def test_a_wrong_job_file_exits_2(
    capsys: pytest.CaptureFixture[str], table: Path, model: Path, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "job.toml").write_text(line + f'\ninput = "in.parquet"\noutput = "o.parquet"\nmodel = "{model}"\n')
    code, error = error_of(capsys, "run", "--config", tmp_path / "job.toml")
    assert code == 2
    assert message in error


def test_defaults_of_the_flags_are_those_of_the_spec(
    capsys: pytest.CaptureFixture[str], resolved: list[JobSpec]
) -> None:
    call(capsys, "run", "in.parquet", "-o", "o.parquet", "--model", "m")
    assert resolved == [JobSpec((Path("in.parquet"),), Path("o.parquet"), "m", prompt_column="prompt")]


PARENT = """
import sys
from batchinfer.jobs.cli.main import main
if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        print(ended.code, sorted({"torch", "triton", "transformers"} & set(sys.modules)))
"""


def test_bench_with_the_stub_and_without_torch(tmp_path: Path) -> None:
    script, figures = tmp_path / "main.py", tmp_path / "bench.json"
    script.write_text(PARENT)
    command = [sys.executable, script, "bench", "--stub", "--num-prompts", 50, "--input-len", 20, "--output-len", 8]
    done = subprocess.run(
        list(map(str, [*command, "--output-json", figures])), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "None []", done.stderr
    values = json.loads(figures.read_text())
    assert (values["input_tokens"], values["output_tokens"]) == (1000, 400)
    assert values["requests_per_second"] > 0
    assert values["report"]["rows_ok"] == 50


@pytest.mark.parametrize(
    ("words", "offered"),
    [("batchinfer ru", "run"), ("batchinfer run --quant", "--quantization"), ("batchinfer sl", "slurm")],
)
def test_the_shell_completes_commands_and_flags(words: str, offered: str) -> None:
    asked = {"_BATCHINFER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "batchinfer"], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [offered]
