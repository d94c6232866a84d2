"""Calibration layer by layer, and models rewritten (scaled, rotated) without changing their output, by transformers."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import QUICK, RECURRENT, made
from fused_experts import FUSED, fused
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchinfer.formats.scheme import weight_scheme
from batchinfer.kernels.rows import quantize_rows
from batchinfer.models.config import read_model_config
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.channel_scales import scale_channels
from batchinfer.quantize.layer_inputs import ROUTER, Calibration
from batchinfer.quantize.methods import method
from batchinfer.quantize.rotated_weights import RotatedWeights
from batchinfer.quantize.rotation import rotation
from batchinfer.quantize.rtn import round_to_nearest
from batchinfer.quantize.walk import Quantizer

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"sliding_window": 20}),
    ("hunyuan_v1_dense", {"head_dim": 16}),
]
LENGTHS = (1, 30, 64, 7, 100)


def sequences(seed: int = 0) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 320, n).astype(np.int32) for n in LENGTHS]


def oracle_of(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def tensors_of(model: Path, layer: int) -> dict[str, Tensor]:
    weights, prefix = SafetensorsWeights(model, read_model_config(model)), read_model_config(model).layers[layer].prefix
    return {name.removeprefix(prefix): weights.read(name) for name in weights.names() if name.startswith(prefix)}


def begun(model: Path, folder: Path) -> Calibration:
    config = read_model_config(model)
    weights = SafetensorsWeights(model, config)
    calibration = Calibration(config, sequences(), torch.float32, folder)
    prefixes = tuple(layer.prefix for layer in config.layers)
    calibration.begin({name: weights.read(name) for name in weights.names() if not name.startswith(prefixes)})
    return calibration


def logits(model: Path) -> list[Tensor]:
    oracle = oracle_of(model).eval()
    with torch.no_grad():
        return [oracle(torch.from_numpy(s.astype(np.int64))[None]).logits[0] for s in sequences()]


def note_experts(name: str, seen: dict[str, list[Tensor]], experts: Any, inputs: tuple[Tensor, ...]) -> None:
    """Note what each expert's products see: transformers holds the matrices of all experts in two tensors."""
    x, chosen = inputs[0].flatten(0, -2), inputs[1]
    for i, gate_up in enumerate(experts.gate_up_proj):
        rows = x[(chosen == i).any(-1)]
        gate, up = torch.nn.functional.linear(rows, gate_up).chunk(2, -1)
        layer = name.removesuffix(".experts").rpartition(".")[0]
        seen.setdefault(f"{layer}.expert {i} gate_up", []).append(rows)
        seen.setdefault(f"{layer}.expert {i} down", []).append(torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("case", [case for case in QUICK if case not in FUSED])
def test_every_matrix_sees_the_inputs_that_it_has_in_transformers(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("batchinfer.quantize.layer_inputs.CHUNK_TOKENS", 70)
    model = made(make_model, case)
    oracle = oracle_of(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
            )
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(partial(note_experts, name, seen))
    with torch.no_grad():
        for sequence in sequences():
            oracle(torch.from_numpy(sequence.astype(np.int64))[None])
    calibration = begun(model, tmp_path)
    assert len(calibration.chunks) > 2 and calibration.tokens == sum(LENGTHS)
    for layer in range(3):
        stages = calibration.stages(layer, tensors_of(model, layer))
        found = {product: torch.cat(list(pieces)) for product, _, pieces in stages if product != ROUTER}
        products = calibration.config.layers[layer].products
        assert list(found) == list(products)
        for product, inputs in found.items():
            for matrix in products[product]:
                at = calibration.config.layers[layer].prefix
                name = product if product.startswith("expert") else matrix.name
                expected = torch.cat(seen[f"{at}{name}"])
                assert inputs.shape[1] == matrix.columns
                torch.testing.assert_close(inputs, expected, atol=2e-4, rtol=2e-4)
        calibration.leave(layer)
    left = {"states-00003", "mixed", "middle"}
    left |= {"behind", "gated"} if calibration.config.ends.per_layer is not None else set()
    assert {path.name for path in tmp_path.iterdir()} - {"inner"} == left


def test_what_is_put_in_place_of_a_weight_is_computed_with(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama")
    tensors = tensors_of(model, 0)

    def inputs_of_down(zeroed: str) -> Tensor:
        mine = dict(tensors)
        calibration = begun(model, tmp_path)
        for product, _, pieces in calibration.stages(0, mine):
            if product == "down":
                return torch.cat(list(pieces))
            if zeroed in [matrix.name for matrix in calibration.config.layers[0].products[product]]:
                mine[f"{zeroed}.weight"] = torch.zeros_like(mine[f"{zeroed}.weight"])
        raise AssertionError

    assert not inputs_of_down("mlp.up_proj").any()
    assert inputs_of_down("self_attn.v_proj").equal(inputs_of_down("self_attn.o_proj"))
    assert not inputs_of_down("self_attn.v_proj").equal(inputs_of_down("nothing"))


def for_transformers(case: str, model: Path) -> Path:
    """The same model, with its experts fused if transformers reads them in no other form."""
    if case not in FUSED:
        return model
    found = fused(load_file(model / "model.safetensors"), FUSED[case])
    return rewritten(model, model.with_name(f"{model.name}-fused"), found)


def rewritten(model: Path, folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = json.loads((model / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_a_rotated_model_computes_the_same(
    make_model: Callable[..., Path], tmp_path: Path, family: str, changes: dict[str, Any], tied: bool
) -> None:
    model = make_model(family, **changes, tie_word_embeddings=tied)
    rotated = RotatedWeights(SafetensorsWeights(model), read_model_config(model), seed=3)
    tensors = {name: rotated.read(name) for name in rotated.names()}
    assert (tensors["model.layers.1.input_layernorm.weight"] == 1).all()
    plain = SafetensorsWeights(model).read("model.layers.1.mlp.down_proj.weight")
    assert not torch.allclose(tensors["model.layers.1.mlp.down_proj.weight"], plain, atol=0.1)
    twin = rewritten(model, tmp_path / "twin", tensors, tie_word_embeddings=False)
    for ours, expected in zip(logits(twin), logits(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96, 352])
def test_rotations_turn_without_stretching_and_leave_no_large_entry(size: int) -> None:
    turned = rotation(size, seed=1)
    torch.testing.assert_close(turned @ turned.t(), torch.eye(size), atol=1e-5, rtol=0)
    assert turned.abs().max() <= 2**0.5 / size**0.5 + 1e-6
    assert size < 3 or not turned.equal(rotation(size, seed=2))


NORM = "post_attention_layernorm.weight"
UNSCALED = (
    "arcee", "exaone4", "flex_olmo", "gemma4_text", "gemma4_unified_text", "gpt_neox", "gpt_oss", "jais2", "nemotron",
    "olmo", "olmo2", "olmo3", "phi", "starcoder2", *RECURRENT,
)  # fmt: skip
SCALED = [case for case in QUICK if case not in UNSCALED]
"""Families in which a norm or a matrix takes up the scales of every product's inputs."""


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-int8"])
@pytest.mark.parametrize("case", SCALED)
def test_folded_scales_change_nothing_but_the_channels(
    make_model: Callable[..., Path], tmp_path: Path, case: str, scheme: str
) -> None:
    original = made(make_model, case)
    weights = SafetensorsWeights(original, read_model_config(original))
    tensors = {name: weights.read(name) for name in weights.names()}
    for name, tensor in tensors.items():
        if "layernorm" in name or "v_proj" in name or "up_proj" in name:
            tensor[::5] *= 4  # loud channels, or there is little to gain by a scale
    model = rewritten(original, tmp_path / "loud", tensors)
    calibration = begun(model, tmp_path)
    moved: set[str] = set()
    for layer in range(3):
        before = tensors_of(model, layer)
        mine = dict(before)
        chosen = weight_scheme(scheme, 32 if scheme == "w4a16" else None)
        scale_channels(calibration, layer, mine, chosen)
        moved |= {name for name in mine if not mine[name].equal(before[name])}
        drained(calibration.stages(layer, before))
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in mine.items()}
    described = calibration.config.layers[0].attention
    assert moved >= {"input_layernorm.weight", f"{described.k.name}.weight", f"{described.v.name}.weight"}, moved
    twin = rewritten(model, tmp_path / "twin", tensors)
    loud, scaled = (for_transformers(case, folder) for folder in (model, twin))
    for ours, expected in zip(logits(scaled), logits(loud), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def with_loud_channels(model: Path, folder: Path) -> Path:
    """The same model, with a few large inputs of its experts and routers."""
    weights = SafetensorsWeights(model, read_model_config(model))
    tensors = {name: weights.read(name) for name in weights.names()}
    for name, tensor in tensors.items():
        if name.endswith(NORM):
            tensor[::24] *= 16
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_scaled_router_chooses_the_same_experts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its scaled weights are not rounded to the checkpoint's type."""
    model = with_loud_channels(made(make_model, "qwen2_moe", dtype="bfloat16"), tmp_path / "loud")
    output = tmp_path / "out"
    quantizer = Quantizer(model, output, weight_scheme("w8a8-int8", None), method("smoothquant"), sequences())
    assert len(list(quantizer.run())) == 4
    quantizer.finish("# A card\n")
    before = tensors_of(model, 0)
    stored = load_file(output / "model-00002-of-00004.safetensors")
    after = {name.removeprefix("model.layers.0."): tensor for name, tensor in stored.items()}
    assert after[NORM].dtype == torch.bfloat16 and not after[NORM].equal(before[NORM])
    x = torch.randn(50, len(after[NORM]))
    for name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight"):
        expected, scaled = (x * found[NORM].float() @ found[name].float().t() for found in (before, after))
        torch.testing.assert_close(scaled, expected, atol=1e-4, rtol=1e-5)


def test_scales_help_experts_with_a_few_large_inputs(make_model: Callable[..., Path], tmp_path: Path) -> None:
    calibration = begun(with_loud_channels(made(make_model, "mixtral"), tmp_path / "loud"), tmp_path)
    tensors = tensors_of(tmp_path / "loud", 0)
    names = [f"block_sparse_moe.experts.{i}.{part}.weight" for i in range(4) for part in ("w1", "w3")]
    scheme = weight_scheme("w8a8-int8", None)

    def error(mine: dict[str, Tensor]) -> float:
        """Return the error of the products of rounded inputs and rounded weights."""
        x = torch.cat(next(list(inputs) for product, _, inputs in calibration.stages(0, mine) if product == ROUTER))
        rows = quantize_rows(x.clone())
        assert rows.scale is not None
        rounded = (rows.values.float() - 128) * rows.scale
        products = ((rounded @ round_to_nearest(mine[n], scheme).dequantize().t(), x @ mine[n].t()) for n in names)
        return sum(float((found - expected).norm() / expected.norm()) for found, expected in products)

    scaled = dict(tensors)
    scale_channels(calibration, 0, scaled, scheme)
    assert error(scaled) < 0.7 * error(tensors), (error(scaled), error(tensors))


@pytest.mark.parametrize("case", UNSCALED)
def test_scales_that_nothing_takes_up_are_refused(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    with pytest.raises(ValueError, match="nothing before it takes up the scales of its inputs; take a method that"):
        Quantizer(made(make_model, case), tmp_path / "out", weight_scheme("w4a16", 32), method("awq"), sequences())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case",
    ["arcee", "cohere", "gemma", "gemma2", "gemma4_text", "mixtral", "olmo", "olmo2", "phi3", "stablelm", *RECURRENT],
)
def test_what_cannot_be_rotated_is_refused(make_model: Callable[..., Path], case: str) -> None:
    model = made(make_model, case)
    with pytest.raises(ValueError, match="--rotate is for layers of Llama's form, with an RMSNorm before each"):
        RotatedWeights(SafetensorsWeights(model), read_model_config(model), seed=3)


def drained(stages: Iterable[tuple[str, Iterable[Tensor]]]) -> None:
    for _ in stages:
        pass
