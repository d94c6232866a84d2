"""Quantizing checkpoints: transformers reads them as we do, an interrupted run resumes, and bad input is refused."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization.utils import is_module_quantized
from engines import compare_logits, engine_of, prompts_of
from random_checkpoint import stored_bytes, write_random_checkpoint
from repository import SHAPE_852M
from safetensors.torch import load_file, save_file

from batchinfer.errors import Refused, UsageError
from batchinfer.formats.scheme import weight_scheme
from batchinfer.jobs import quantize as job
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path
from batchinfer.quality.evaluator import Evaluator
from batchinfer.quantize.methods import method
from batchinfer.quantize.rounding import Grid
from batchinfer.quantize.rtn import round_to_nearest
from batchinfer.quantize.walk import LayerReport, Quantizer

SCHEMES = [
    ("w4a16", 32, "rtn", False),
    ("w4a16", 0, "gptq", True),
    ("w4a16", 32, "awq", False),
    ("w4a8", 32, "gptq", False),
    ("w4a8", 0, "rtn-mse", True),
    ("w8a16", None, "rtn-importance", True),
    ("w8a16", 16, "rtn", False),
    ("w8a8-int8", None, "gptq", False),
    ("w8a8-int8", None, "smoothquant", False),
    ("w8a8-fp8", None, "rtn", False),
]
SEQUENCES = [np.random.default_rng(n).integers(2, 320, 40 + 9 * n).astype(np.int32) for n in range(8)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def finished(quantizer: Quantizer) -> list[LayerReport]:
    reports = list(quantizer.run())
    quantizer.finish("# A card\n")
    return reports


@pytest.mark.parametrize(("scheme", "group_size", "name", "rotate"), SCHEMES)
def test_transformers_computes_from_it_what_we_do(
    make_model: Callable[..., Path], tmp_path: Path, scheme: str, group_size: int | None, name: str, rotate: bool
) -> None:
    """It loads as it was written. Inputs are left in floating point here: each engine rounds them in its own way."""
    output = tmp_path / "out"
    model = make_model("qwen3", tie_word_embeddings=True)
    sequences = SEQUENCES if method(name).calibrated else None
    quantizer = Quantizer(
        model, output, weight_scheme(scheme, group_size), method(name), sequences, 0 if rotate else None
    )
    reports = finished(quantizer)
    assert len(reports) == 4 and all(len(r.errors) == 7 and 0 < max(r.errors.values()) < 0.3 for r in reports[1:])
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=output, check=True, capture_output=True)
    assert (output / "SHA256SUMS").read_text().count("\n") == 4
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is not rotate
    oracle = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    assert sum(is_module_quantized(module) for module in oracle.modules()) == 7 * 3
    for module in oracle.modules():
        module.quantization_enabled = False  # of inputs: the weights are expanded once, before the first forward pass
    # Both compute in float32 with the same weights, in another order: logits up to some 10 differ in the sixth digit.
    for ours, expected in compare_logits(engine_of(output, quantization="none"), oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    notes = {"w8a8-int8": "8-bit products", "w4a8": "8-bit products"}
    if cpu_path() != REFERENCE:
        notes["w4a8"] = "stay in 4 bits, for 8-bit inputs"
    assert notes.get(scheme, "expanded to float32") in engine_of(output).stats().notes[0]


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w8a16", "w8a8-fp8", "w8a8-int8"])
def test_transformers_reads_experts_unless_the_report_says_otherwise(
    make_model: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    model = make_model("qwen3_moe", **fields)
    reports = finished(
        Quantizer(model, tmp_path / "out", weight_scheme(scheme, None if "w8" in scheme else 32), method("rtn"))
    )
    if "batchinfer reads experts in this form, and transformers does not" in reports[0].notes:
        assert scheme == "w8a8-int8"
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        return
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for module in oracle.modules():
        module.quantization_enabled = False
    for ours, expected in compare_logits(engine_of(tmp_path / "out", quantization="none"), oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    if scheme == "w4a8":
        for ours, expected in compare_logits(engine_of(tmp_path / "out"), oracle, prompts_of(8, 100)):
            assert (ours - expected).norm() / expected.norm() < 0.1, "inputs are rounded to 8 bits"


def test_the_files_of_the_tokenizer_come_along(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, output = shutil.copytree(make_model("llama"), tmp_path / "model"), tmp_path / "out"
    beside = [Path("tokenizer.json"), Path("added_tokens.json"), Path("additional_chat_templates/default.jinja")]
    for path in beside:
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_text(path.name)
    finished(Quantizer(model, output, weight_scheme("w8a16", 16), method("rtn")))
    assert [(output / path).read_text() for path in beside] == [path.name for path in beside]


@pytest.mark.parametrize("rotation", [None, 0])
def test_a_head_that_is_stored_beside_a_tied_config_is_kept(
    make_model: Callable[..., Path], tmp_path: Path, rotation: int | None
) -> None:
    model, output = shutil.copytree(make_model("llama", tie_word_embeddings=True), tmp_path / "model"), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    reports = finished(Quantizer(model, output, weight_scheme("w8a16", 16), method("rtn"), None, rotation))
    assert any("lm_head.weight is stored and differs" in note for note in reports[0].notes)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for ours, expected in compare_logits(engine_of(output, quantization="none"), oracle, prompts_of(8, 100)):
        assert torch.cosine_similarity(ours, expected, 0) > 0.95


@pytest.mark.parametrize(("name", "rotation"), [("rtn", None), ("gptq", 5), ("awq", None)])
def test_an_interrupted_run_goes_on_where_it_stopped(
    make_model: Callable[..., Path], tmp_path: Path, name: str, rotation: int | None
) -> None:
    model, scheme = make_model("llama"), weight_scheme("w4a16", 32)
    sequences = SEQUENCES if method(name).calibrated else None

    def quantizer(output: Path) -> Quantizer:
        return Quantizer(model, output, scheme, method(name), sequences, rotation)

    whole = finished(quantizer(tmp_path / "whole"))
    walk = quantizer(tmp_path / "twice").run()
    assert [next(walk).layer, next(walk).layer] == [-1, 0]
    walk.close()
    assert not (tmp_path / "twice" / "config.json").exists()
    (tmp_path / "twice" / "model-00003-of-00004.unfinished").write_bytes(b"half")
    if sequences:
        (tmp_path / "twice" / "calibration" / "mixed").write_bytes(b"of a layer that was not finished")
    with pytest.raises(ValueError, match="begun with another model, scheme, method, calibration or version"):
        Quantizer(model, tmp_path / "twice", scheme, method("rtn-mse"))
    if sequences:
        with pytest.raises(ValueError, match="begun with another model, scheme, method, calibration or version"):
            Quantizer(model, tmp_path / "twice", scheme, method(name), SEQUENCES[1:], rotation)
    again = finished(quantizer(tmp_path / "twice"))
    assert [report.resumed for report in again] == [True, True, False, False]
    assert [report.errors for report in again] == [report.errors for report in whole]
    assert files(tmp_path / "twice") == files(tmp_path / "whole")
    assert not (tmp_path / "twice" / "calibration").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gptq_makes_up_for_what_rounding_alone_loses(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Of the whole model, on rows that it was not calibrated with."""
    model = make_model(family)
    held_out = [np.random.default_rng(100 + n).integers(2, 320, 60).astype(np.int32) for n in range(6)]
    lost = {}
    for name in ("rtn", "gptq"):
        sequences = [np.random.default_rng(n).integers(2, 320, 200).astype(np.int32) for n in range(20)]
        finished(Quantizer(model, tmp_path / name, weight_scheme("w4a16", 32), method(name), sequences))
        lost[name] = Evaluator(engine_of(tmp_path / name), engine_of(model)).scores(held_out).divergence
    assert lost["gptq"] < 0.8 * lost["rtn"], lost


def test_a_run_that_stopped_in_its_last_lines_goes_on(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scheme = make_model("llama"), weight_scheme("w4a16", 32)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("batchinfer.quantize.walk.shutil.copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            finished(Quantizer(model, tmp_path / "out", scheme, method("rtn")))
    again = finished(Quantizer(model, tmp_path / "out", scheme, method("rtn")))
    assert all(report.resumed for report in again) and again[1].errors
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "quantize.json").exists()


def test_a_full_disk_is_said_as_such(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """By a limit on the size of files, which the writer meets in the middle of a layer."""
    program = Path(sys.executable).with_name("batchinfer")
    command = [program, "quantize", make_model("llama"), "-o", tmp_path / "out", "--group-size", "32"]
    limit = (60_000, 60_000)
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.returncode == 74 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "model-00001-of-00004.unfinished" in done.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_two_runs_into_one_folder_are_one_too_many(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, scheme = make_model("llama"), weight_scheme("w4a16", 32)
    first = Quantizer(model, tmp_path / "out", scheme, method("gptq"), SEQUENCES)
    walk = first.run()
    next(walk)
    with pytest.raises(ValueError, match=r"another run quantizes into .*out; wait for it, or take another folder"):
        Quantizer(model, tmp_path / "out", scheme, method("gptq"), SEQUENCES)
    walk.close()
    del first, walk
    assert len(finished(Quantizer(model, tmp_path / "out", scheme, method("gptq"), SEQUENCES))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.mlp.up_proj.weight": None}, "no tensor model.layers.2.mlp.up_proj.weight"),
        ({"model.layers.1.self_attn.k_proj.bias": None}, "no tensor model.layers.1.self_attn.k_proj.bias"),
        ({"model.norm.weight": (95,)}, r"tensor model.norm.weight has shape \[95\]; config.json asks for \[96\]"),
        ({"lm_head.weight": (7, 96)}, r"lm_head.weight has shape \[7, 96\]; config.json asks for \[320, 96\]"),
    ],
)
def test_a_broken_checkpoint_is_found_before_the_first_layer(
    make_model: Callable[..., Path], tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    model = shutil.copytree(make_model("qwen2"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, shape in change.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Quantizer(model, tmp_path / "out", weight_scheme("w4a16", 32), method("gptq"), SEQUENCES, 0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="the tokenizer gives token 320, but vocab_size is 320"):
        strange = [np.array([2, 320], np.int32)]
        Quantizer(make_model("qwen2"), tmp_path / "out", weight_scheme("w4a16", 32), method("gptq"), strange)


def test_a_searched_clip_errs_less_and_more_bits_less_still() -> None:
    weight = torch.randn(64, 256) * torch.rand(64, 1)
    weight[:, ::37] *= 4

    def error(name: str, clip: bool) -> float:
        importance = torch.ones(256) if clip else None
        matrix = round_to_nearest(weight, weight_scheme(name, 128), importance)
        return float((matrix.dequantize() - weight).square().sum())

    assert error("w4a16", True) < 0.95 * error("w4a16", False)
    assert error("w8a16", False) < 0.01 * error("w4a16", True)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_other_scale_of_the_search_errs_less(bits: int) -> None:
    groups = torch.randn(5, 32)
    grid = Grid(bits)
    importance = torch.rand(32)
    scale = grid.scales(groups, importance)
    plain = grid.scales(groups)

    def error(s: torch.Tensor) -> torch.Tensor:
        return ((grid.round(groups, s) * s - groups).square() * importance).sum(-1)

    for part in torch.linspace(1.0, 0.5, 26):
        assert (error(scale) <= error(plain * part) * (1 + 1e-6)).all()


def test_what_cannot_be_is_refused_by_name(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(make_model("llama"))
    rows = job.CalibrationRows()
    quantize = partial(job.quantize, model, None, tmp_path / "out", rows=rows)
    with pytest.raises(UsageError, match="--scheme is 'w2a16'; it must be one of w4a16"):
        quantize("w2a16", "rtn", None)
    with pytest.raises(UsageError, match="--method is 'magic'; it must be one of rtn, rtn-mse"):
        quantize("w4a16", "magic", None)
    with pytest.raises(UsageError, match="--group-size is 64; w8a8-int8 has a scale a channel"):
        quantize("w8a8-int8", "rtn", 64)
    with pytest.raises(UsageError, match="--group-size is 20; it must be a multiple of 8"):
        quantize("w4a16", "rtn", 20)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        Refused, match=r"--group-size 128 does not divide the 96 columns of model\.layers\.0\.self_attn\.q"
    ):
        quantize("w4a16", "rtn", None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(Refused, match="full is not empty; take another folder"):
        job.quantize(model, None, tmp_path / "full", "w4a16", "rtn", 32, rows)
    with pytest.raises(Refused, match=r"model x/y/z.gguf is a GGUF file, which cannot be quantized again"):
        job.quantize("x/y/z.gguf", None, tmp_path / "gguf", "w8a16", "rtn", None, rows)
    job.quantize(model, None, tmp_path / "once", "w8a16", "rtn", None, rows)
    with pytest.raises(Refused, match=r"is quantized already \(compressed-tensors, pack-quantized 8 bits\)"):
        job.quantize(str(tmp_path / "once"), None, tmp_path / "again", "w4a16", "rtn", 32, rows)


def test_the_command_prints_what_it_made(make_model: Callable[..., Path], tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("batchinfer")
    command = [program, "quantize", make_model("llama"), "-o", tmp_path / "out", "--group-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "w4a16, groups of 32, by rtn-mse" in done.stdout and "error of     weights" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| down_proj |" in card and "batchinfer quantize" in card
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}, "others may read it as they may read other files"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 65 and "is not empty" in again.stderr and "Traceback" not in again.stderr


def test_a_signal_stops_it_behind_a_layer(make_model: Callable[..., Path], tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("batchinfer")
    output = tmp_path / "out"
    command = [program, "quantize", make_model("llama", num_hidden_layers=40), "-o", output, "--group-size", "32"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(output.glob("model-00003-*.safetensors")):
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate()
    assert running.returncode == 75 and re.search(
        r"stopped after \d+ of 41 files; give the same command to continue", said
    ), said
    assert "Traceback" not in said and not (output / "config.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"time +[\d.]+ s; \d+ files? made before", again) and (output / "config.json").exists()


@pytest.mark.parametrize("path", sorted(job.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_of_ours(path: Path) -> None:
    recipe = job.read_recipe(path.stem)
    assert recipe["description"]
    method(recipe["method"]).check(weight_scheme(recipe["scheme"], recipe.get("group_size")))


def test_a_recipe_sets_what_the_flags_leave_open(make_model: Callable[..., Path], tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("batchinfer")
    listed = subprocess.run([program, "recipes"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == len(list(job.RECIPES.glob("*.toml"))) and "w4a16-rtn " in listed

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [program, "quantize", make_model("llama"), "-o", tmp_path / flags[1].replace("/", "-"), *flags]
        return subprocess.run(command, capture_output=True, text=True)

    assert "w4a16, groups of 32, by rtn-mse" in run("--recipe", "w4a16-g32-rtn").stdout
    assert "w8a8-int8, whole channels, by rtn\n" in run("--method", "rtn", "--recipe", "w8a8-int8-rtn").stdout
    wrong = run("--recipe", "w4a99")
    assert wrong.returncode == 2 and "--recipe is 'w4a99'; it must be one of w4a16-awq, w4a16-g32-rtn" in wrong.stderr
    (tmp_path / "own.toml").write_text('schema = "w4a16"')
    wrong = run("--recipe", str(tmp_path / "own.toml"))
    assert wrong.returncode == 2 and "unknown key 'schema'; the nearest known key is 'scheme'" in wrong.stderr


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.long(minutes=n)) for name, n in (("rtn-mse", 2), ("gptq", 4), ("awq", 4))],
)
def test_one_layer_at_a_time_is_in_memory(tmp_path: Path, method: str) -> None:
    """Layers of the 852M shape: four more of them add 360 MB to the file, and to the peak next to nothing.

    Activations pass in pieces through files, so that a few pieces of calibration show what a thousand take.
    """
    shape = json.loads(SHAPE_852M.read_text())
    program = Path(sys.executable).with_name("batchinfer")
    sizes, peaks = [], []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
        model = write_random_checkpoint(tmp_path / "config.json", folder)
        command = [program, "quantize", model, "-o", tmp_path / "out", "--method", method, "--calibration-rows", "12"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(printed)
        peaks.append(float(re.findall(r"peak memory +([\d,]+) MB", printed)[0].replace(",", "")) * 1e6)
        sizes.append(stored_bytes(model))
        shutil.rmtree(tmp_path / "out")
    assert peaks[1] < 1.6e9
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0])
