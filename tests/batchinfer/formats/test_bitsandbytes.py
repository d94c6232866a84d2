"""bitsandbytes' formats, from their definition, and beside the library where it is installed."""

import json
import re
from typing import Any

import pytest
import torch
from quantized_models import int8, nf4
from stored import K, N, Stored, read
from torch import Tensor

from batchinfer.formats.bitsandbytes import BitsAndBytes
from batchinfer.formats.registry import checkpoint_format, refuse_on_gpu

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__nf4"


def drawn(shape: tuple[int, int] = (N, K)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(N, 128), (N, K), (40, 50), (6, 32), (300, 640)])
def test_four_bits(shape: tuple[int, int], double: bool) -> None:
    """Blocks of 64 numbers end with a row, or go over the ends of rows, or the last one is not full."""
    tensors, expected = nf4(drawn(shape), 64, double)
    matrix = read(FOUR, tensors, shape)
    assert matrix.dequantize().equal(expected)
    assert matrix.bits == 4 and matrix.activations == "float"


def test_four_bits_by_hand() -> None:
    """The first number of an octet is in its high half; the second row has a scale of its own."""
    state = {"quant_type": "fp4", "blocksize": 2, "dtype": "float16", "shape": [2, 2]}
    tensors = {
        "weight": torch.tensor([[0x1F], [0x02]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([2.0, 10.0]),
        "weight.quant_map": torch.arange(16.0) - 7,
        "weight.quant_state.bitsandbytes__fp4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    assert read({**FOUR, "bnb_4bit_quant_type": None}, tensors, (2, 2)).dequantize().tolist() == [[-12, 16], [-70, -50]]


def test_eight_bits() -> None:
    tensors, expected = int8(drawn())
    matrix = read(EIGHT, tensors)
    assert matrix.dequantize().equal(expected)
    by_channel = matrix.by_channel()
    assert by_channel is not None and by_channel[0].equal(tensors["weight"])


def test_the_modules_that_are_skipped_and_the_head() -> None:
    tensors, _ = int8(drawn())
    stored = Stored(tensors)
    form = checkpoint_format({**EIGHT, "llm_int8_skip_modules": ["down_proj", "model.layers.1"]})
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        assert form.matrix(module, (N, K), stored) is None
    assert form.matrix("m", (N, K), stored) is not None
    for name in tensors:
        stored[f"lm_head.{name}"] = tensors[name]
    assert form.matrix("lm_head", (N, K), stored) is not None
    assert checkpoint_format(EIGHT).matrix("lm_head", (N, K), stored) is None


@pytest.mark.parametrize("four", [True, False])
def test_tensors_are_those_that_the_library_writes(four: bool) -> None:
    library: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not among the packages for developing")
    for kind in ("nf4", "fp4") if four else ("int8",):
        for shape in ((N, 128), (N, K), (300, 640)):
            for double in (True, False) if four else (False,):
                if four:
                    layer = library.nn.Linear4bit(shape[1], shape[0], bias=False)
                    layer.weight = library.nn.Params4bit(drawn(shape), False, None, 64, double, kind)
                    layer = layer.to("cpu")
                    expected = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                else:
                    layer = library.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
                    layer.weight = library.nn.Int8Params(drawn(shape), requires_grad=False, has_fp16_weights=False)
                    layer = layer.to("cpu")
                    expected = library.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
                matrix = read({**FOUR, "bnb_4bit_quant_type": kind} if four else EIGHT, layer.state_dict(), shape)
                torch.testing.assert_close(matrix.dequantize(), expected, rtol=0 if four else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (STATE, torch.zeros(4, dtype=torch.uint8), f"tensor m.{STATE} is not a JSON object"),
        (STATE, torch.zeros(4), f"m.{STATE}"),
        ("weight", torch.zeros(N * K // 2, dtype=torch.uint8), "m.weight"),
        ("weight.absmax", torch.zeros(3, dtype=torch.uint8), "m.weight.absmax"),
        ("weight.nested_absmax", torch.ones(3), "m.weight.nested_absmax"),
        ("weight.nested_quant_map", torch.ones(16), "m.weight.nested_quant_map"),
        ("weight.quant_map", torch.ones(256), "m.weight.quant_map"),
    ],
)
def test_damaged_tensors_are_named(name: str, broken: Tensor, message: str) -> None:
    tensors, _ = nf4(drawn())
    with pytest.raises(ValueError, match=re.escape(message)):
        read(FOUR, tensors | {name: broken})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [K, N], f"m.{STATE} says [{K}, {N}]; config.json asks for [{N}, {K}]"),
        ("blocksize", 0, "blocksize is 0; it must be a positive number"),
        ("nested_blocksize", "256", "nested_blocksize is '256'; it must be a positive number"),
        ("nested_offset", None, "nested_offset is None; it must be a number"),
    ],
)
def test_a_damaged_state_is_named(field: str, value: Any, message: str) -> None:
    tensors, _ = nf4(drawn())
    state = {**json.loads(bytes(tensors[STATE].tolist())), field: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        read(FOUR, tensors | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})


def test_a_module_that_is_not_quantized_but_should_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"tensor m\.weight has no quant_state of bitsandbytes"):
        read(FOUR, {"weight": drawn()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**FOUR, "load_in_8bit": True}, "load_in_4bit is True and load_in_8bit is True; one of them must be true"),
        ({**FOUR, "load_in_4bit": False}, "load_in_4bit is False and load_in_8bit is False; one of them"),
        ({**FOUR, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'; supported: uint8"),
        ({**FOUR, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'; supported: fp4, nf4"),
        ({**EIGHT, "llm_int8_has_fp16_weight": True}, "not supported: llm_int8_has_fp16_weight"),
        ({**EIGHT, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head'; expected a list of names"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint_format(config)


def test_four_bits_have_no_kernel_on_a_gpu() -> None:
    assert isinstance(checkpoint_format(FOUR), BitsAndBytes)
    with pytest.raises(ValueError, match="the checkpoint is bitsandbytes nf4, for which there is no kernel on a GPU"):
        refuse_on_gpu(checkpoint_format(FOUR))
    refuse_on_gpu(checkpoint_format(EIGHT))
