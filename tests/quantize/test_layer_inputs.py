"""Calibration layer by layer, and models rewritten (scaled, rotated) without changing their output, by transformers."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import QUICK, RECURRENT, made
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from batchinfer.formats.scheme import weight_scheme
from batchinfer.models.config import read_model_config
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.channel_scales import scale_channels
from batchinfer.quantize.layer_inputs import Calibration
from batchinfer.quantize.methods import method
from batchinfer.quantize.rotated_weights import RotatedWeights
from batchinfer.quantize.rotation import rotation
from batchinfer.quantize.walk import Quantizer

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"sliding_window": 20}),
    ("hunyuan_v1_dense", {"head_dim": 16}),
]
STACKED = ("gpt_oss", "granitemoe", "granitemoeshared")
"""Families whose experts are stored in one tensor, which is not quantized."""
MIXTURES = (
    "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "mellum", "minimax_m2", "mixtral", "olmoe",
    "lfm2_moe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open", *STACKED,
)  # fmt: skip
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


@pytest.mark.parametrize("case", [case for case in QUICK if case not in STACKED])
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
        found = {product: torch.cat(list(pieces)) for product, _, pieces in stages}
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


UNSCALED = (
    "arcee", "exaone4", "gemma4_text", "gemma4_unified_text", "gpt_neox", "jais2", "nemotron", "olmo", "olmo2", "olmo3",
    "phi", "starcoder2", *RECURRENT,
)  # fmt: skip
SCALED = [case for case in QUICK if case not in (*UNSCALED, *MIXTURES)]
"""Families in which a norm or a matrix takes up the scales of every product's inputs."""


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-int8"])
@pytest.mark.parametrize("case", SCALED)
def test_folded_scales_change_nothing_but_the_channels(
    make_model: Callable[..., Path], tmp_path: Path, case: str, scheme: str
) -> None:
    original = made(make_model, case)
    weights = SafetensorsWeights(original)
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
    for ours, expected in zip(logits(twin), logits(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_scales_of_experts_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the inputs of experts are those of their router too"):
        model = made(make_model, "mixtral")
        Quantizer(model, tmp_path / "out", weight_scheme("w4a16", 32), method("awq"), sequences())


@pytest.mark.parametrize("case", [case for case in UNSCALED if case not in MIXTURES])
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
