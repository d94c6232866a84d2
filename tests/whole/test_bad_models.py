"""Models that must not be run: each is refused with exit code 65, in one line with the file and what to do."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from chat_models import CHATML, save
from gguf_models import write_model
from safetensors.torch import load_file, save_file
from stub_jobs import STUB, spec, write

from batchinfer.errors import Refused
from batchinfer.host.files import Checksums
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.job import run
from batchinfer.llm import LLM
from batchinfer.models.config import read_model_config
from batchinfer.models.hub import resolve_model
from batchinfer.models.weights import SafetensorsWeights, refuse_not_finite
from batchinfer.text import chat
from batchinfer.text.chat import ChatTemplate, TemplateRefused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model with weights, tokenizer and chat template, in a folder of this test's own."""
    folder = save(tmp_path / "model", CHATML)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    for file in make_model("llama", vocab_size=size).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, *flags: str
) -> tuple[int, str]:
    """The exit code of a job with the model, and its last line on stderr."""
    table = write(tmp_path / "in.parquet", prompt=["Hello"])
    arguments = ["run", table, "-o", tmp_path / "out.parquet", "--model", model, "--max-tokens", "2", *flags]
    monkeypatch.setattr("sys.argv", ["batchinfer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return int(ended.value.code or 0), (error.splitlines() or [""])[-1]


Refusal = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refusal:
    """`refused(model, *flags) -> (exit code, line)` of a whole job; nothing of it may be left."""

    def call(model: Path, *flags: str) -> tuple[int, str]:
        found = refusal(capsys, monkeypatch, tmp_path, model, *flags)
        assert not (tmp_path / "out.parquet").exists()
        return found

    return call


def entry(start: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def text(header: Any) -> bytes:
    return json.dumps(header).encode()


ONE = text(entry(0, 8))
MALFORMED = {
    "header not JSON": (b"nope", 8, None),
    "header longer than the file": (text({"a": entry(0, 8)}), 8, 1000),
    "header of 2^63 bytes": (text({"a": entry(0, 8)}), 8, 1 << 63),
    "overlap": (text({"a": entry(0, 8), "b": entry(4, 12)}), 12, None),
    "gap": (text({"a": entry(0, 8), "b": entry(12, 20)}), 20, None),
    "shape overflows": (text({"a": entry(0, 8, shape=[1 << 62, 8])}), 8, None),
    "offsets overflow": (text({"a": entry(0, 1 << 64, shape=[2])}), 8, None),
    "offsets backwards": (text({"a": entry(8, 0, shape=[2])}), 8, None),
    "trailing bytes": (text({"a": entry(0, 8)}), 9, None),
    "body cut off": (text({"a": entry(0, 8)}), 7, None),
    "the same entry twice": (b'{"a":' + ONE + b',"a":' + ONE + b"}", 8, None),
    "type against bytes": (text({"a": entry(0, 8, "F16", [2])}), 8, None),
    "type unknown": (text({"a": entry(0, 8, "Q9")}), 8, None),
    "nested without end": (b"[" * 100_000, 8, None),
    "no file at all": (b"", 0, None),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, kind: str) -> None:
    header, body, length = MALFORMED[kind]
    data = struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * body
    (tmp_path / WEIGHTS).write_bytes(data if header else b"")
    with pytest.raises(ValueError, match="damaged") as error:
        SafetensorsWeights(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(error.value)


def test_a_malformed_file_ends_the_job_with_65(model: Path, refused: Refusal) -> None:
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    code, line = refused(model)
    assert code == 65 and f"{model / WEIGHTS} is damaged" in line and "fetch it again" in line


def test_nan_weights_are_refused_by_name(model: Path, refused: Refusal) -> None:
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 7] = float("nan")
    save_file(tensors, model / WEIGHTS)
    code, line = refused(model)
    assert code == 65 and f"{model / WEIGHTS}: tensor {name} holds 1 of" in line and "fetch it again" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_number_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    fine = torch.full((33, 17), torch.finfo(dtype).max).to(dtype)  # whose sum overflows
    refuse_not_finite(fine, "t")
    refuse_not_finite((-fine.float()).to(dtype), "t")
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    for value in bad:
        wrong = fine.clone()
        wrong[32, 16] = torch.tensor(value).to(dtype)
        with pytest.raises(ValueError, match=r"t holds 1 of 561 numbers that are NaN or infinite"):
            refuse_not_finite(wrong, "t")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found_by_its_checksum(model: Path, refused: Refusal) -> None:
    digest = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    (model / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n{'0' * 64} *other.bin\n")
    flip(model / WEIGHTS)
    code, line = refused(model)
    assert code == 65 and f"{model / WEIGHTS} is damaged: its sha256" in line and "SHA256SUMS says" in line
    flip(model / WEIGHTS)
    Checksums([model / WEIGHTS]).check()
    (model / "SHA256SUMS").write_text("none of that\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS: 'none of that' is not a sha256.*remove SHA256SUMS"):
        SafetensorsWeights(model)


def test_a_flipped_bit_in_the_hubs_cache_is_found_by_its_name(model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    (model / WEIGHTS).rename(blob)
    (model / WEIGHTS).symlink_to(blob)
    SafetensorsWeights(model).checksums.check()
    flip(blob)
    with pytest.raises(ValueError, match=r"is damaged: .* its name in the Hub's cache says .*; fetch or copy it again"):
        SafetensorsWeights(model).checksums.check()


@pytest.mark.parametrize(
    "name",
    [
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_a_git_lfs_pointer_is_named_with_the_remedy(model: Path, refused: Refusal, name: str) -> None:
    (model / name).write_text(POINTER)
    code, line = refused(model)
    assert code == 65 and f"{model / name} is a git-lfs pointer" in line and "`git lfs pull`" in line


def test_a_git_lfs_pointer_in_place_of_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"index\.json is a git-lfs pointer"):
        SafetensorsWeights(model)


@pytest.mark.parametrize("path", ["../outside.safetensors", "{}/outside.safetensors", "..", "", "a/b.safetensors", 5])
def test_the_weight_map_names_no_path(model: Path, tmp_path: Path, path: Any) -> None:
    (model / WEIGHTS).rename(tmp_path / "outside.safetensors")
    path = path.format(tmp_path) if isinstance(path, str) else path
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
    with pytest.raises(ValueError, match=r"which is not a \*\.safetensors file beside it") as error:
        SafetensorsWeights(model)
    assert str(index) in str(error.value)


def test_a_link_beside_the_weight_map_is_a_file_like_any_other(model: Path, tmp_path: Path) -> None:
    names = dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)
    (model / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (model / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert set(SafetensorsWeights(model).names()) == names.keys()


ABSURD: dict[str, tuple[Any, ...]] = {
    "hidden_size": (1 << 40, -96, 0, 1.5, "96", None),
    "num_hidden_layers": (10**9, -1),
    "num_attention_heads": (1 << 40, 7, -6),
    "num_key_value_heads": (5, 1 << 20),
    "head_dim": (15, 1 << 30),
    "vocab_size": (1 << 40, -1),
    "intermediate_size": (1 << 60,),
    "max_position_embeddings": (1 << 62,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, many in ABSURD.items() for value in many])
def test_absurd_dimensions_are_refused_before_memory_is_asked_for(
    make_model: Callable[..., Path], tmp_path: Path, field: str, value: Any
) -> None:
    config = json.loads((make_model("llama") / "config.json").read_text())
    if field != "head_dim":
        del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=field) as error:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_absurd_dimensions_end_the_job_with_65(model: Path, refused: Refusal) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 1 << 40}))
    code, line = refused(model)
    assert code == 65 and f"{model / 'config.json'}: hidden_size is {1 << 40}; it must be" in line


def test_fields_that_are_not_read_are_noted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "is_llama_config": True, "unsloth_fixed": True}))
    report = run(spec(model, write(tmp_path / "in.parquet", prompt=["Hello"])))
    note = "fields of config.json that are not read, as in transformers: is_llama_config, unsloth_fixed"
    assert note in report.notes and note in capsys.readouterr().err


def test_the_type_is_refused_before_anything_else_is_asked_for(model: Path, refused: Refusal) -> None:
    """A model for images and text, with neither max_position_embeddings nor a tokenizer that is read."""
    wrapper = {"model_type": "aria", "text_config": {"model_type": "aria_text", "max_position_embeddings": 512}}
    (model / "config.json").write_text(json.dumps(wrapper))
    (model / "tokenizer.json").write_text("no tokenizer")
    code, line = refused(model)
    said = "config.json: model_type is 'aria', which wraps a language model of type 'aria_text'; supported are arcee,"
    assert code == 65 and said in line
    with pytest.raises(Refused, match="which wraps a language model of type 'aria_text'"):
        LLM(model)


def test_a_tokenizer_with_more_tokens_than_the_embedding(model: Path, tmp_path: Path) -> None:
    """Known before the engine is loaded: this one computes nothing and would not complain."""
    config = json.loads((model / "config.json").read_text())
    tokens = config["vocab_size"]
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": tokens - 1}))
    path = write(tmp_path / "in.parquet", prompt=["Hello"])
    with pytest.raises(Refused, match=f"tokenizer.json has {tokens} tokens, but vocab_size is {tokens - 1} in ") as e:
        run(spec(model, path), STUB)
    assert str(model / "config.json") in str(e.value) and "leave out --tokenizer" in str(e.value)


def test_an_unknown_key_in_a_job_file_is_a_usage_error(model: Path, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "job.toml").write_text("temprature = 1.0\n")
    code, line = refused(model, "--config", str(tmp_path / "job.toml"))
    assert code == 2 and "temprature" in line and "temperature" in line and str(tmp_path / "job.toml") in line


LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='abcd') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
# Lists of lists that are compared without a step of the interpreter: nothing but the end of the process ends that.
COMPARED = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param(LOOP, "took more than 10 seconds", marks=pytest.mark.long),
        (DOUBLED, "took more than 1024 MiB"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "did what its sandbox forbids"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "did what its sandbox forbids"),
        pytest.param(COMPARED, "killed the process that tried it", marks=pytest.mark.long),
    ],
    ids=["time", "memory", "escape", "globals", "compared"],
)
def test_a_template_that_burns_or_escapes_refuses_the_model(
    model: Path, tmp_path: Path, template: str, said: str
) -> None:
    (model / "chat_template.jinja").write_text(template)
    path = write(tmp_path / "in.parquet", prompt=["Hello"])
    run(spec(model, path, overwrite=True), STUB)  # plain prompts do not go through it
    with pytest.raises(
        Refused, match=f"{model}: the chat template {said}.*; take another one with --chat-template or --tokenizer"
    ):
        run(spec(model, path, chat=True, overwrite=True), STUB)


MEMORY = [
    "{{ 'x' * 10 ** 11 }}", "{{ [0] * 10 ** 11 }}", "{{ 'x'.center(10 ** 11) }}", "{{ 'x'.ljust(10 ** 11) }}",
    "{{ 'x'.zfill(10 ** 11) }}", "{{ 'x' | center(10 ** 11) }}", "{{ 'a\nb' | indent(10 ** 11) }}",
    "{{ '%99999999999d' % 1 }}", "{{ '%99999999999d' | format(1) }}", "{{ '{:99999999999}'.format(1) }}",
    "{{ '\t'.expandtabs(2 ** 31 - 1) }}", "{{ ('x' * 10 ** 6).replace('x', 'y' * 10 ** 6) }}", DOUBLED,
    "{% set ns = namespace(x='abcd') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", MEMORY)
def test_no_step_of_a_template_takes_the_memory(source: str) -> None:
    with pytest.raises(TemplateRefused, match="the chat template took more than 1024 MiB"):
        ChatTemplate.compile(source, {}).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ 1 // ns.x }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 1.5 | round(10 ** 9, 'ceil') }}",
        "{{ ('f' * 10 ** 8) | int(base=16) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_no_number_of_a_template_has_endless_digits(source: str) -> None:
    with pytest.raises(chat.ChatError, match="the chat template raised OverflowError"):
        ChatTemplate.compile(source, {}).render([{"role": "user", "content": "a"}])


def test_a_row_for_which_the_template_does_not_end_is_an_error_of_that_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the handlers of signals are as they were."""
    import signal

    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    (model / "chat_template.jinja").write_text("{% if 'burn' in messages[0].content %}" + LOOP + "{% endif %}fine")
    path = write(tmp_path / "in.parquet", prompt=["Hello", "burn", "Hello"])
    numbers = (signal.SIGVTALRM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    report = run(spec(model, path, chat=True), STUB)
    assert report.rows_by_error == {"template_error": 1} and report.rows_ok == 2
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.fixture
def gguf_file(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model(tmp_path / "m.gguf", make_model("llama"), "F32")
    return tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("at", "put", "said"),
    [
        (0, b"FUGG", "is not a GGUF file: it begins with b'FUGG'"),
        (4, struct.pack("<I", 99), "GGUF version 99; supported are 2 and 3"),
        (8, struct.pack("<Q", 1 << 63), "claims 9223372036854775808 tensors"),
        (16, struct.pack("<Q", 1 << 63), "claims 9223372036854775808 metadata entries"),
        (24, struct.pack("<Q", 1 << 63), "claims 9223372036854775808 bytes of a text"),
        (0, POINTER.encode(), "is a git-lfs pointer"),
    ],
    ids=["magic", "version", "tensors", "entries", "text", "pointer"],
)
def test_headers_of_gguf_files(gguf_file: Path, refused: Refusal, at: int, put: bytes, said: str) -> None:
    data = bytearray(gguf_file.read_bytes())
    data[at : at + len(put)] = put
    gguf_file.write_bytes(data)
    code, line = refused(gguf_file)
    assert code == 65 and str(gguf_file) in line and said in line


def test_a_gguf_file_that_is_cut_off(gguf_file: Path, refused: Refusal) -> None:
    data = gguf_file.read_bytes()
    for left, said in ((10, "it has 10 bytes"), (2000, "truncated"), (len(data) - 10, "lies beyond the file's")):
        gguf_file.write_bytes(data[:left])
        code, line = refused(gguf_file)
        assert code == 65 and str(gguf_file) in line and said in line


def test_a_gguf_file_with_nan(gguf_file: Path, refused: Refusal) -> None:
    data = bytearray(gguf_file.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    gguf_file.write_bytes(data)
    assert resolve_model(str(gguf_file), None)
    code, line = refused(gguf_file)
    assert code == 65 and "NaN or infinite: the checkpoint is damaged" in line and "tensor" in line
