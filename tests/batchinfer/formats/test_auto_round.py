"""AutoRound's own format, by layouts and by settings of modules."""

import re
from typing import Any

import numpy as np
import pytest
from packers import awq_tensors, gptq_tensors, one_by_one
from stored import GROUP, K, N, Stored, check, read

from batchinfer.formats.auto_round import AutoRound
from batchinfer.formats.gptq import Packing
from batchinfer.formats.registry import checkpoint_format

BASE = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.16.1",
    "iters": 200,
    "block_name_to_quantize": "model.layers",
}


def packing(config: dict[str, Any], module: str) -> Packing | None:
    form = checkpoint_format(config)
    assert isinstance(form, AutoRound)
    return form._packing(module)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("layout", "version"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        (None, "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
    ],
)
def test_layouts(layout: str | None, version: str, symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    groups = K // GROUP
    q = rng.integers(0, 16, (N, K))
    z = np.full((N, groups), 8) if symmetric else rng.integers(0, 16, (N, groups))
    scales = (rng.uniform(0.5, 2.0, (N, groups)) * rng.choice([-1, 1], (N, groups))).astype(np.float16)
    group_of = [k // GROUP for k in range(K)]
    tensors = awq_tensors(q, z, scales) if version == "awq" else gptq_tensors(q, z, scales, group_of, 4, version)
    config = {**BASE, "packing_format": layout, "sym": symmetric, "block_name_to_quantize": None}
    check(read(config, tensors), one_by_one(q, z, scales, group_of))


def test_a_name_counts_before_the_first_pattern_that_is_found_in_a_module() -> None:
    extra = {
        "model.layers.0.self_attn.q_proj": {"bits": 16, "act_bits": 16},
        r".*down_proj.*": {"bits": 8, "group_size": -1},
        "mlp": {"sym": False},
        "model.layers.1.mlp.down_proj": {"group_size": 64},
        "nothing": {},
        "lm_head": {"bits": 8, "data_type": "int", "act_data_type": None},
    }
    config = {**BASE, "extra_config": extra}
    base = Packing(4, GROUP, True, 1)
    assert packing(config, "model.layers.0.self_attn.q_proj") is None
    assert packing(config, "model.layers.1.self_attn.q_proj") == base
    assert packing(config, "model.layers.0.mlp.down_proj") == Packing(8, -1, True, 1)
    assert packing(config, "model.layers.1.mlp.down_proj") == Packing(4, 64, True, 1)
    assert packing(config, "model.layers.1.mlp.up_proj") == Packing(4, GROUP, False, 1)
    assert packing(config, "lm_head") == Packing(8, GROUP, True, 1)
    assert packing(BASE, "lm_head") is None
    assert checkpoint_format(config).name == "AutoRound, 4 and 8 bits"


def test_single_modules_of_a_model_in_floating_point_may_be_quantized() -> None:
    config = {**BASE, "bits": 16, "sym": False, "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}
    assert packing(config, "model.layers.0.mlp.up_proj") == Packing(8, GROUP, False, 1)
    assert packing(config, "model.layers.0.mlp.down_proj") is None


@pytest.mark.parametrize("blocks", ["model.layers, other", [["model.layers.0", "model.layers.1"]], ["model.layers"]])
def test_modules_outside_the_blocks_stay_in_floating_point(blocks: Any) -> None:
    config = {**BASE, "block_name_to_quantize": blocks}
    assert packing(config, "model.layers.1.mlp.up_proj") is not None
    assert packing(config, "model.vision_tower.layers.1.mlp.up_proj") is None
    assert packing({**config, "block_name_to_quantize": None}, "model.vision.up_proj") is not None
    assert checkpoint_format(config).matrix("vision.up_proj", (N, K), Stored({})) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format is 'auto_round:llm_compressor'; supported: "),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; supported: int"),
        ({"bits": 3}, "bits is 3; GPTQ is read with 4 or 8 bits"),
        ({"packing_format": "auto_round:awq", "bits": 8}, "bits is 8; AWQ's layout is read with 4 bits"),
        ({"act_bits": 8}, "not supported: act_bits"),
        ({"rotation_configs": [{"a": 1}]}, "not supported: rotation_configs"),
        ({"extra_config": {"m": {"bits": 2}}}, "extra_config: m: bits is 2; GPTQ is read with 4 or 8 bits"),
        ({"extra_config": {"m": {"act_bits": 8}}}, "extra_config: m: act_bits is 8; inputs stay in floating point"),
        ({"extra_config": {"m": {"super_bits": 6}}}, "extra_config: m: not supported: super_bits"),
        ({"extra_config": {"m": {"data_type": "fp8"}}}, "extra_config: m: data_type is 'fp8'; supported: int"),
        ({"extra_config": {"(": {"bits": 8}}}, "extra_config: '(' is not a regular expression"),
        ({"extra_config": ["m"]}, "extra_config is ['m']; expected an object of objects"),
        ({"block_name_to_quantize": 3}, "block_name_to_quantize is 3; expected a list of names"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint_format({**BASE, **changes})
