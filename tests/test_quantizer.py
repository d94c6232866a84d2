"""Quantized checkpoints that we write: read by transformers as by us, whole after an interruption, refused by name."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from engines import compare_logits, engine_of, prompts_of
from safetensors.torch import save_file

from batchinfer.jobs import quantize as job
from batchinfer.jobs.spec import Refused, UsageError
from batchinfer.quantize.rounding import Grid
from batchinfer.quantize.rtn import round_to_nearest
from batchinfer.quantize.scheme import weight_scheme
from batchinfer.quantizer import Quantizer

SCHEMES = [("w4a16", 32), ("w4a16", 0), ("w8a16", None), ("w8a16", 16), ("w8a8-int8", None), ("w8a8-fp8", None)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
def test_transformers_computes_from_it_what_we_do(
    make_model: Callable[..., Path], tmp_path: Path, scheme: str, group_size: int | None
) -> None:
    """Inputs are left in floating point here: how they are rounded is each engine's own business."""
    output = tmp_path / "out"
    done = job.quantize(str(make_model("qwen3")), None, output, scheme, "rtn", group_size)
    assert 0 < done.errors["q_proj"] < 0.2 and len(done.errors) == 7
    config = json.loads((output / "config.json").read_text())
    plain = copy.deepcopy(config)
    plain["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (output / "config.json").write_text(json.dumps(plain))
    settings = transformers.CompressedTensorsConfig(run_compressed=False)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, quantization_config=settings
    ).eval()
    (output / "config.json").write_text(json.dumps(config))
    for ours, expected in compare_logits(engine_of(output, quantization="none"), oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    note = "8-bit products" if scheme == "w8a8-int8" else "expanded to float32"
    assert note in engine_of(output).stats().notes[0]


def test_an_interrupted_run_goes_on_where_it_stopped(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, scheme = make_model("llama"), weight_scheme("w4a16", 32)

    def quantizer(output: Path) -> Quantizer:
        return Quantizer(model, output, scheme, "rtn", round_to_nearest)

    whole = list(quantizer(tmp_path / "whole").run())
    walk = quantizer(tmp_path / "twice").run()
    assert [next(walk).layer, next(walk).layer] == [-1, 0]
    walk.close()
    assert not (tmp_path / "twice" / "config.json").exists()
    (tmp_path / "twice" / "model-00003-of-00004.unfinished").write_bytes(b"half")
    with pytest.raises(ValueError, match="begun with another model, scheme or method"):
        Quantizer(model, tmp_path / "twice", scheme, "rtn-mse", round_to_nearest)
    again = list(quantizer(tmp_path / "twice").run())
    assert [report.resumed for report in again] == [True, True, False, False]
    assert [report.errors for report in again] == [report.errors for report in whole]
    assert files(tmp_path / "twice") == files(tmp_path / "whole")


def test_a_run_that_stopped_in_its_last_lines_goes_on(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scheme = make_model("llama"), weight_scheme("w4a16", 32)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("batchinfer.quantizer.shutil.copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            list(Quantizer(model, tmp_path / "out", scheme, "rtn", round_to_nearest).run())
    again = list(Quantizer(model, tmp_path / "out", scheme, "rtn", round_to_nearest).run())
    assert all(report.resumed for report in again) and again[1].errors
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "quantize.json").exists()


def test_a_searched_clip_errs_less_and_more_bits_less_still() -> None:
    weight = torch.randn(64, 256) * torch.rand(64, 1)
    weight[:, ::37] *= 4

    def error(name: str, clip: bool) -> float:
        return float((round_to_nearest(weight, weight_scheme(name, 128), clip).dequantize() - weight).square().sum())

    assert error("w4a16", True) < 0.95 * error("w4a16", False)
    assert error("w8a16", False) < 0.01 * error("w4a16", True)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_other_scale_of_the_search_errs_less(bits: int) -> None:
    groups = torch.randn(5, 32)
    grid = Grid(bits)
    scale = grid.scales(groups, clip=True)
    plain = grid.scales(groups, clip=False)

    def error(s: torch.Tensor) -> torch.Tensor:
        return (grid.round(groups, s) * s - groups).square().sum(-1)

    for part in torch.linspace(1.0, 0.5, 26):
        assert (error(scale) <= error(plain * part) * (1 + 1e-6)).all()


def test_what_cannot_be_is_refused_by_name(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(make_model("llama"))
    quantize = partial(job.quantize, model, None, tmp_path / "out")
    with pytest.raises(UsageError, match="--scheme is 'w2a16'; it must be one of w4a16"):
        quantize("w2a16", "rtn", None)
    with pytest.raises(UsageError, match="--method is 'magic'; it must be one of rtn, rtn-mse"):
        quantize("w4a16", "magic", None)
    with pytest.raises(UsageError, match="--group-size is 64; w8a8-int8 has a scale a channel"):
        quantize("w8a8-int8", "rtn", 64)
    with pytest.raises(UsageError, match="--group-size is 20; it must be a multiple of 8"):
        quantize("w4a16", "rtn", 20)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="--group-size 128 does not divide hidden_size 96"):
        quantize("w4a16", "rtn", None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(Refused, match="full is not empty; take another folder"):
        job.quantize(model, None, tmp_path / "full", "w4a16", "rtn", 32)
    job.quantize(model, None, tmp_path / "once", "w8a16", "rtn", None)
    with pytest.raises(Refused, match=r"is quantized already \(compressed-tensors, pack-quantized 8 bits\)"):
        job.quantize(str(tmp_path / "once"), None, tmp_path / "again", "w4a16", "rtn", 32)


def test_the_command_prints_what_it_made(make_model: Callable[..., Path], tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("batchinfer")
    command = [program, "quantize", make_model("llama"), "-o", tmp_path / "out", "--group-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "w4a16, groups of 32, by rtn-mse" in done.stdout and "error of down_proj" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| down_proj |" in card and "batchinfer quantize" in card
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 65 and "is not empty" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("path", sorted(job.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_of_ours(path: Path) -> None:
    recipe = job.read_recipe(path.stem)
    assert recipe["description"]
    weight_scheme(recipe["scheme"], recipe.get("group_size"))
    assert recipe["method"] in ("rtn", "rtn-mse")


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
    assert wrong.returncode == 2 and "--recipe is 'w4a99'; it must be one of w4a16-g32-rtn" in wrong.stderr
    (tmp_path / "own.toml").write_text('schema = "w4a16"')
    wrong = run("--recipe", str(tmp_path / "own.toml"))
    assert wrong.returncode == 2 and "unknown key 'schema'; the nearest known key is 'scheme'" in wrong.stderr


@pytest.mark.long
def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """The 852M shape, in one file: the peak stays under 40 % of its size and a gigabyte."""
    shape = json.loads((Path(__file__).parents[1] / "benchmarks/shapes/llama-852m/config.json").read_text())
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    narrow = shape["num_key_value_heads"] * shape["head_dim"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    sizes |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden).bfloat16()}
    tensors |= {"lm_head.weight": torch.randn(vocab, hidden).bfloat16(), "model.norm.weight": torch.ones(hidden)}
    for i in range(shape["num_hidden_layers"]):
        for name, size in sizes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(size).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shape))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    del tensors
    program = Path(sys.executable).with_name("batchinfer")
    command = [program, "quantize", model, "-o", tmp_path / "out"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(printed)
    peak = float(re.search(r"peak memory +([\d,]+) MB", printed)[1].replace(",", "")) * 1e6  # type: ignore[index]
    size = (model / "model.safetensors").stat().st_size
    assert peak < 0.4 * size + 1e9
    assert 0.4 * size + 1e9 < size + 0.2e9, "or one that holds the whole model would pass"
