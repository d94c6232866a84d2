"""What a checkpoint and a table cannot do: run code, write elsewhere, reach the network, or get into the logs."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from chat_models import CHATML, save
from product import product
from stub_jobs import ENGINES, SHAPE, spec, write

from batchinfer.formats.pack import unpack
from batchinfer.jobs.job import run
from batchinfer.jobs.process.safe_errors import described, traced

CLI = [sys.executable, "-c", "from batchinfer.jobs.cli.main import main; main()"]
SECONDS = 300


@pytest.fixture
def real_model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model with weights, tokenizer and chat template, in a folder of this test's own."""
    folder = save(tmp_path / "model", CHATML)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    for file in make_model("llama", vocab_size=size).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def job(*arguments: Any, before: tuple[str, ...] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command line in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME")}
    return subprocess.run(
        [*before, *CLI, "run", *map(str, arguments)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


class Opened:
    """A pickle of it creates a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_a_pickle_is_never_opened(real_model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "opened"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl"):
        (real_model / name).write_bytes(pickle.dumps(Opened(canary)))
    table, out = write(tmp_path / "in.parquet", prompt=["Hello"]), tmp_path / "out.parquet"
    done = job(table, "-o", out, "--model", real_model, "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    (real_model / "model.safetensors").unlink()
    done = job(table, "-o", out, "--model", real_model, "--overwrite")
    assert done.returncode == 65 and "pickles) are never read: save the model anew" in done.stderr, done.stderr
    assert not canary.exists()
    pickle.loads((real_model / "pytorch_model.bin").read_bytes())
    assert canary.exists()


BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "np.load", "numpy.load", "os.system",
    "importlib.import_module",
}  # fmt: skip


def dangers(source: str) -> set[str]:
    """Imports and calls by which data could become code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & BANNED_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & BANNED_IMPORTS
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & BANNED_CALLS
            found |= {ast.unparse(keyword) for keyword in node.keywords if keyword.arg == "trust_remote_code"}
    return found


def test_the_product_has_no_way_from_data_to_code() -> None:
    """The pipes between a job and its own child do pickle, within multiprocessing: both ends are ours, and what goes
    through them are our own dataclasses."""
    assert {name: found for name, source in product().items() if (found := dangers(source))} == {}
    assert dangers("import torch\ntorch.load('x')\nfrom pickle import loads\nexec('x')") == {
        "torch.load", "pickle", "exec",
    }  # fmt: skip


REMOTE = "from pathlib import Path\nPath({!r}).touch()\nclass Model: pass\nclass Config: pass\nclass Tokens: pass\n"


@pytest.mark.parametrize("architecture", ["llama", "someone_elses"])
def test_no_code_of_a_checkpoint_runs(real_model: Path, tmp_path: Path, architecture: str) -> None:
    canary = tmp_path / "imported"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "custom_generate/generate", "__init__", "setup"):
        file = real_model / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(REMOTE.format(str(canary)))
    table, out = write(tmp_path / "in.parquet", prompt=["Hello"]), tmp_path / "out.parquet"
    maps = {
        "config.json": {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_x.Tokens", None]},
    }
    for name, auto_map in maps.items():
        content = json.loads((real_model / name).read_text())
        (real_model / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    config = json.loads((real_model / "config.json").read_text()) | {"model_type": architecture}
    (real_model / "config.json").write_text(json.dumps(config))
    done = job(table, "-o", out, "--model", real_model, "--max-tokens", 2)
    assert done.returncode == 65, done.stderr
    refused = "auto_map asks to run code" if architecture == "llama" else "model_type is 'someone_elses'"
    assert refused in done.stderr and str(real_model / "config.json") in done.stderr
    if architecture == "llama":  # the tokenizer's map alone is read past: tokenizer.json says all
        del config["auto_map"]
        (real_model / "config.json").write_text(json.dumps(config))
        done = job(table, "-o", out, "--model", real_model, "--max-tokens", 2)
        assert done.returncode == 0, done.stderr
    assert not canary.exists()


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_no_value_of_a_table_becomes_a_path(real_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    evil = ["../../x", "/tmp/../x", str(tmp_path / "y"), "a\x00b", "~/z", "|id", "file:///etc/passwd"]
    name = "../../column"
    table = write(folder / "in.parquet", **{"prompt": evil, "id": evil, name: evil})
    before = files_of(tmp_path)
    done = job(
        table, "-o", folder / "out.parquet", "--model", real_model, "--id-column", "id", "--max-tokens", 2,
        "--temperature", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = pq.read_table(folder / "out.parquet")
    assert result["id"].to_pylist() == result[name].to_pylist() == evil
    new = files_of(tmp_path) - before
    assert all(path.parts[:2] == ("a", "b") and path.parts[2] in ("out.parquet", "out.run") for path in new), new


def without_network() -> tuple[str, ...]:
    """A command that runs another where there is no network but a loopback that is down."""
    for command in (("unshare", "-n"), ("unshare", "-rn")):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    if os.environ.get("CI"):
        pytest.fail("no network namespace can be made here, and under CI this must be proved")
    pytest.skip("NO NETWORK NAMESPACE CAN BE MADE HERE: it is not proved that a job needs no network")


def test_a_job_ends_right_without_a_network(real_model: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "in.parquet", prompt=["Hello", "Hello again"])
    arguments = (table, "--model", real_model, "--max-tokens", 4, "--chat")
    cut = without_network()
    alone = subprocess.run(
        [*cut, sys.executable, "-c", "import socket; socket.create_connection(('1.1.1.1', 53))"], capture_output=True
    )
    assert b"unreachable" in alone.stderr
    done = job(*arguments, "-o", tmp_path / "offline.parquet", before=cut)
    assert done.returncode == 0, done.stderr
    done = job(*arguments, "-o", tmp_path / "online.parquet")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "offline.parquet").equals(pq.read_table(tmp_path / "online.parquet"))


@pytest.mark.skipif(shutil.which("strace") is None and not os.environ.get("CI"), reason="there is no strace here")
def test_a_job_connects_to_nothing(real_model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-e", "trace=connect,sendto,socket", "-o", str(trace))
    subprocess.run([*strace, sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 1))"])
    assert re.search(r"connect\(.*AF_INET", trace.read_text())
    table = write(tmp_path / "in.parquet", prompt=["Hello", "Hello again"])
    done = job(table, "-o", tmp_path / "o.parquet", "--model", real_model, "--max-tokens", 4, before=strace)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"AF_INET", trace.read_text())


CANARY = "xyzzy-canary-7713"
# In two halves, so that the source itself holds none.
LEAKS = """
class Leaks(Poisoned):
    # As a library does that puts what it was given into its error's text.
    def end(self):
        prompt = "-".join(["xyzzy", "canary", "7713"])
        try:
            raise KeyError(prompt)
        except KeyError as error:
            raise ValueError(f"cannot take {prompt}") from error

class LeaksAlways(Leaks):
    def step(self):
        self.end()
"""
CHATS = [
    [{"role": "user", "content": CANARY}],
    [{"role": CANARY, "content": CANARY}],
    [{"role": "user", "content": CANARY + "\ufdd0"}],
    [{"role": "system", "content": CANARY}],  # the template raises with it
    [{"role": "user", "content": CANARY * 200}],
    [{"role": "user", "content": CANARY, CANARY: CANARY}],
]
RAISES = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception(messages[0].content) }}{% endif %}"


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("prompts", "Slow"),
        ("prompts", "Leaks"),
        ("prompts", "LeaksAlways"),
        ("prompts", "Poisoned"),
        ("template", "Leaks"),
        ("messages", "Leaks"),
        ("jsonl", "Leaks"),
    ],
)
def test_no_text_of_a_row_is_logged(tmp_path: Path, kind: str, engine: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + LEAKS)
    (tmp_path / "main.py").write_text(MAIN)
    folder = save(tmp_path / "model", RAISES)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps({**SHAPE, "max_position_embeddings": 256, "vocab_size": size}))
    # Rows 13 and 30 are those that engines die over.
    texts = [CANARY * 300, f"a {CANARY}", None, f"{CANARY}\x00", ""] * 7
    ids = [f"{CANARY}-{i}" for i in range(len(texts))]
    texts[13] = texts[30] = CANARY
    table, flags = tmp_path / "in.parquet", ["--id-column", "id"]
    if kind == "messages":
        chats = [CHATS[i % len(CHATS)] for i in range(len(ids))]
        chats[13] = chats[30] = CHATS[0]
        write(table, messages=[json.dumps(chat) for chat in chats], id=ids)
        flags += ["--messages-column", "messages"]
    elif kind == "jsonl":
        table = tmp_path / "in.jsonl"
        rows = [{"prompt": text, "id": i} for text, i in zip([5, *texts[1:]], ids, strict=True)]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write(table, prompt=texts, id=ids)
        flags += ["--prompt-template", "{prompt}: {id}"] if kind == "template" else []
    command = [sys.executable, tmp_path / "main.py", tmp_path, engine, "run", table, "-o", work / "out.parquet"]
    command += ["--model", folder, "--max-tokens", "4", "--temperature", "1", "--commit-rows", "1", *flags]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh", *map(str, command)],
        cwd=work, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "TMPDIR": str(work)},
    )  # fmt: skip
    assert done.returncode == (70 if engine == "LeaksAlways" else 0), done.stderr
    written = [path for path in work.rglob("*") if path.is_file() and path.suffix != ".parquet"]
    names = {path.name for path in written}
    assert {"worker.log", "run.json"} <= names and ("report.json" in names) == (engine != "LeaksAlways")
    assert ("Traceback" in (work / "out.run" / "worker.log").read_text()) == engine.startswith("Leaks")
    leaks = [path for path in written if path.parent.name != "parts" and CANARY.encode() in path.read_bytes()]
    assert leaks == [] and CANARY not in done.stdout + done.stderr
    assert not any(CANARY in str(path) for path in work.rglob("*"))


MAIN = """
import sys
from functools import partial
from batchinfer.jobs.cli.main import main
from batchinfer.jobs import job
from batchinfer.jobs.job import run

if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    job.run = partial(run, engine=f"engines_of_the_test:{sys.argv.pop(1)}")
    main()
"""


def test_an_error_among_numbers_keeps_its_text_and_any_other_its_place() -> None:
    with pytest.raises(IndexError) as numbers:
        unpack(torch.zeros(2, dtype=torch.int32), 4, 7)
    assert described(numbers.value).startswith("IndexError: Dimension out of range")
    with pytest.raises(KeyError) as text:
        {}[CANARY]
    with pytest.raises(ValueError, match=CANARY) as led:
        int(CANARY)
    led.value.__cause__ = text.value
    pattern = r"KeyError in .*test_security, line \d+ \(the error's text is left out, .*\)"
    assert re.fullmatch(pattern, described(text.value))
    whole = "".join(traced(led.value))
    assert CANARY not in whole and whole.count("Traceback") == 2 and "which led to" in whole
    with pytest.raises(OSError) as system:
        Path("/nowhere/at/all").read_bytes()
    assert described(system.value) == "FileNotFoundError: No such file or directory"


def test_an_internal_error_of_the_job_is_logged_without_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchinfer.jobs import job
    from batchinfer.jobs.cli.main import main

    def fail(spec: Any) -> None:
        pa.array([CANARY]).cast(pa.int64())

    monkeypatch.setattr(job, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["batchinfer", "run", "in.parquet", "-o", "o.parquet", "--model", "m"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 70
    line = capsys.readouterr().err
    [log] = tmp_path.glob("batchinfer-*.log")
    assert "internal: ArrowInvalid in " in line and CANARY not in line + log.read_text()


def test_a_template_reads_no_file_of_the_machine(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "{% include '/etc/passwd' %}{% import 'os' as os %}{{ os.getcwd() }}")
    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 1000}))
    path = write(tmp_path / "in.parquet", prompt=["Hello"])
    run(spec(folder, path, chat=True), "batchinfer.jobs.process.stub_engine:StubEngine")
    [message] = pq.read_table(tmp_path / "out.parquet")["error_message"].to_pylist()
    assert message == "the chat template raised TypeError"
