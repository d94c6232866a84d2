"""Settings by module of GPTQ checkpoints. What the numbers stand for is tested in `test_registry.py`."""

from typing import Any

import numpy as np
import pytest
from packers import gptq_tensors, one_by_one
from stored import GROUP, K, N, Stored, check, read

from batchinfer.formats.gptq import GPTQ, Packing
from batchinfer.formats.registry import checkpoint_format

BASE = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}


def packing(config: dict[str, Any], module: str) -> Packing | None:
    form = checkpoint_format(config)
    assert isinstance(form, GPTQ)
    return form._packing(module)


def test_the_first_pattern_that_a_name_begins_with_counts() -> None:
    """Read `dynamic` as GPTQModel does."""
    rules = {
        r"-:model\.layers\.0\.": {},
        r"+:.*\.(?:down|up)_proj": {"bits": 8, "group_size": -1},
        r".*q_proj$": {"sym": False},
        r".*down_proj": {"bits": 4},
        "layers.2": {"bits": 8},  # not at the beginning
        "-:lm_head": {},
    }
    config = {**BASE, "dynamic": rules, "lm_head": True}
    base = Packing(4, GROUP, True, 1)
    assert packing(config, "model.layers.0.mlp.down_proj") is None
    assert packing(config, "model.layers.2.mlp.down_proj") == Packing(8, -1, True, 1)
    assert packing(config, "model.layers.2.self_attn.q_proj") == Packing(4, GROUP, False, 1)
    assert packing(config, "model.layers.2.self_attn.k_proj") == base
    assert packing(config, "lm_head") is None
    assert packing({**config, "dynamic": None}, "lm_head") == base
    assert packing(BASE, "lm_head") is None
    assert checkpoint_format(config).name == "GPTQ, 4 and 8 bits"


def test_a_module_with_other_settings_is_read_by_them() -> None:
    rng = np.random.default_rng(0)
    q, z = rng.integers(0, 256, (N, K)), rng.integers(0, 256, (N, 1))
    scales = rng.uniform(0.5, 2.0, (N, 1)).astype(np.float16)
    tensors = gptq_tensors(q, z, scales, [0] * K, 8, "gptq_v2")
    dynamic = {"m": {"bits": 8, "group_size": -1, "sym": False}}
    matrix = read({**BASE, "checkpoint_format": "gptq_v2", "dynamic": dynamic}, tensors)
    check(matrix, one_by_one(q, z, scales, [0] * K))


def test_a_module_that_is_left_in_floating_point_is_not_read() -> None:
    assert checkpoint_format({**BASE, "dynamic": {"-:m": {}}}).matrix("m", (N, K), Stored({})) is None


@pytest.mark.parametrize("within", [[["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]], ["k_proj", "up_proj"]])
def test_only_the_named_modules_of_a_layer_are_quantized(within: list[Any]) -> None:
    config = {**BASE, "modules_in_block_to_quantize": within, "lm_head": True}
    assert packing(config, "model.layers.1.self_attn.k_proj") is not None
    assert packing(config, "model.layers.1.mlp.up_proj") is not None
    assert packing(config, "model.layers.1.mlp.down_proj") is None
    assert packing(config, "lm_head") is not None
