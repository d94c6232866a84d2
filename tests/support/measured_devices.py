"""Constants of devices that nobody measured, for predictions that can be worked out by hand."""

from pathlib import Path

import numpy as np

from batchinfer.cost.step_cost import PRODUCTS, DeviceCost, StepCost, Weights, Work, quantities
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.plan.prediction import Job, JobShape

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16", "eos_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip


def cost_of(model: Path, per_token: float = 1e-3) -> DeviceCost:
    """A device on which a token takes so long and nothing else counts, but that 8 bits halve it and int8 KV doubles."""
    nothing = Work(*[np.zeros(1)] * 7)
    steps = {}
    for name, factor in {"float32": 2.0, "bfloat16": 1.0, "w8a8-int8": 0.5, "w4a8": 0.5}.items():
        seconds = {}
        for kv_cache in ("float32", "bfloat16", "int8", "fp8"):
            config = EngineConfig(model)
            shape = Job(JobShape(np.array([0, 1]), SamplingParams(), 64), config).model
            seconds |= dict.fromkeys(quantities(nothing, shape, Weights(1, 1, 3e7), kv_cache, "filtered"), 0.0)
        stored = {key: per_token * factor / 64 for key in seconds if key.startswith("stored key")}
        steps[name] = StepCost(seconds | stored | {"stored key in int8": per_token * factor / 32})
    rates = dict.fromkeys(PRODUCTS, 1e11)
    return DeviceCost(steps, dict.fromkeys(PRODUCTS, 1e-9), 2.0, rates, 1e10, 3e7)
