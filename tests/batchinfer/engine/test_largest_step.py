"""The step by which a GPU's memory is measured: as large as any of the job's, in the blocks of one sequence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchinfer.engine.attention_inputs import RaggedInputs
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.cuda_graphs import MOST_RECORDINGS, RECORDING_BYTES, most_recorded
from batchinfer.engine.largest_step import largest_step, probe_blocks
from batchinfer.engine.pool_size import Room, bytes_per_token, pool_blocks
from batchinfer.host.device import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
from batchinfer.kernels.attention_plan import AttentionPlan, Tile, Tiling
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.models.config import ModelConfig, read_model_config

TILING = Tiling(few=Tile(16, 32), many=Tile(64, 32), same=Tile(64, 32))
SHAPE = AttentionShape(None, 4, 2, 64)
INPUTS = RaggedInputs({SHAPE: TILING}, 8)


@pytest.mark.parametrize("rows", [1, 3, 100, 1024, 5000])
@pytest.mark.parametrize("most_seqs", [1, 64, 1024])
def test_it_is_as_large_as_a_step_gets_and_stays_in_the_blocks_of_one_sequence(rows: int, most_seqs: int) -> None:
    expected = min(rows, most_seqs)
    config = EngineConfig(
        Path(), max_model_len=2000, max_num_seqs=most_seqs, max_num_batched_tokens=8192, expected_batch=expected
    )
    batch = largest_step(config, INPUTS, 1, 8)
    assert len(batch.sequences) == expected, "every row that can run side by side samples a token"
    assert batch.prompt_tokens == expected * min(8192 // expected, 1999)
    blocks = probe_blocks(config)
    plan = batch.attention[SHAPE]
    assert isinstance(plan, AttentionPlan)
    for named in (plan.table, batch.slots // config.block_size):
        assert int(named.min()) >= 1 and int(named.max()) < blocks
    assert blocks <= 2000 // config.block_size + 2


def test_steps_for_half_the_rows_after_memory_ran_out() -> None:
    config = EngineConfig(Path(), max_num_seqs=64, max_num_batched_tokens=512, expected_batch=64).halved()
    assert len(largest_step(config, INPUTS, 1, 8).sequences) == 32


@dataclass(frozen=True)
class Published:
    """A model's published shape, and the memory in bytes that the driver reports for the smallest card that holds it.

    24 GB: NVIDIA L4, 23,034 MiB. 40 GB: A100, 40,960 MiB. 48 GB: L40S, 46,068 MiB.
    """

    fields: dict[str, Any]
    parameters: float  # in billions, from the model's card
    card_bytes: int


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}


def shape(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": positions,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


PUBLISHED = {
    "Llama-3-8B": Published(LLAMA | shape(4096, 14336, 32, 32, 8, 128256, 8192), 8.03, 23034 << 20),
    "Llama-2-7B": Published(LLAMA | shape(4096, 11008, 32, 32, 32, 32000, 4096), 6.74, 40960 << 20),
    "Qwen2.5-14B": Published(QWEN | shape(5120, 13824, 48, 40, 8, 152064, 32768), 14.77, 46068 << 20),
}
DRIVER = 600 << 20  # bytes of a CUDA context with its kernels


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_in_bfloat16_fit_the_cards_that_hold_them(name: str, tmp_path: Path) -> None:
    """By arithmetic, with all defaults: a job of many rows, and prompts as long as the model allows."""
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published.fields))
    model = read_model_config(tmp_path)
    weights = 2 * sum(int(np.prod(tensor)) for _, tensor in model.tensors())
    assert weights / 2e9 == pytest.approx(published.parameters, rel=0.002)
    rows, tokens = MAX_NUM_SEQS["cuda"], MAX_NUM_BATCHED_TOKENS["cuda"]
    config = EngineConfig(
        tmp_path, device="cuda", max_model_len=model.max_positions, max_num_seqs=rows, max_num_batched_tokens=tokens
    )
    a_token = bytes_per_token(model, torch.bfloat16)
    step = activations(model, tokens, rows)
    in_use = weights + DRIVER
    probe = probe_blocks(config) * config.block_size * a_token
    assert in_use + probe + step < published.card_bytes, "the step is measured"
    before = rows * 2 * config.block_size * a_token
    assert name != "Llama-2-7B" or in_use + before + step > published.card_bytes, "blocks for each row did not fit"
    tokens = most_recorded(config)
    recorded = activations(model, tokens, tokens) + MOST_RECORDINGS * RECORDING_BYTES
    room = Room.on_device(
        published.card_bytes, published.card_bytes - in_use, step, recorded, config.gpu_memory_utilization
    )
    assert MOST_RECORDINGS * RECORDING_BYTES < room.recordings <= recorded, "some steps are recorded"
    blocks, _ = pool_blocks(config, a_token, torch.bfloat16, room)
    assert blocks * config.block_size > model.max_positions


def activations(model: ModelConfig, tokens: int, rows: int) -> int:
    """Bytes of a step at most: all that a layer computes, and logits with copies in float32."""
    layer = model.layers[0]
    widths = 4 * model.hidden_size + 2 * (layer.attention.q.rows + layer.attention.k.rows + layer.attention.v.rows)
    inner = next(shape[0] for name, shape in model.tensors() if name.endswith("mlp.gate_proj.weight"))
    return 2 * tokens * (widths + 3 * inner) + rows * model.vocab_size * (2 + 4 + 4)
