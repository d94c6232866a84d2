"""The tensors of a checkpoint of transformers, as llama.cpp's converter lays them out in a GGUF file.

The names of tensors are those that the format's own library maps a checkpoint's names to.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_facts import architecture_of
from numpy.typing import NDArray
from safetensors.torch import load_file

Values = NDArray[np.float32]

PERMUTED = {
    "arcee", "granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "internlm3", "iquestcoder", "llama",
    "ministral3", "mistral", "mixtral", "olmo", "smollm3",
}  # fmt: skip
"""Families in whose queries and keys the converter puts the rows of a pair side by side."""
AROUND_ONE = {"gemma", "gemma2", "gemma3_text", "nemotron", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}
"""Families whose checkpoints hold the distance from 1 of the weights of norms."""


def laid_out(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, Values]]:
    """The tensors, by their names in the file."""
    architecture, layers = architecture_of(config), config["num_hidden_layers"]
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known.get(architecture, gguf.MODEL_ARCH.QWEN3MOE), layers)
    loaded = {name: tensor.float().numpy() for name, tensor in load_file(model / "model.safetensors").items()}
    for name, values in _stacked(loaded).items():
        for changed, part in _changed(name, values, config):
            name = changed.replace("e_score_correction_bias", "e_score_correction.bias")
            found = name if name.startswith("blk.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            yield found, np.ascontiguousarray(part)


def with_joined(tensors: dict[str, Values]) -> dict[str, Values]:
    """Store queries, keys and values as one, and gate and up of experts, as the converter does if it is asked to."""
    made = dict(tensors)
    for parts, name, axis in (
        ("attn_q attn_k attn_v", "attn_qkv", 0),
        ("ffn_gate_exps ffn_up_exps", "ffn_gate_up_exps", 1),
    ):
        first, *others = parts.split()
        for found in [tensor for tensor in tensors if f".{first}." in tensor]:
            together = [made.pop(found.replace(first, part)) for part in (first, *others)]
            made[found.replace(first, name)] = np.concatenate(together, 0 if found.endswith(".bias") else axis)
    return made


def _stacked(tensors: dict[str, Values]) -> dict[str, Values]:
    """The tensors of experts, and of the norms of heads, as one for all."""
    made: dict[str, Any] = {}
    for name, values in tensors.items():
        found = re.fullmatch(r"(.+\.experts|.+layernorm\.norms)\.(\d+)\.(.+)", name)
        if found is None:
            made[name] = values
        else:
            made.setdefault(f"{found[1]}.{found[3]}".replace(".norms", ""), {})[int(found[2])] = values
    return {
        name: np.stack([values[i] for i in range(len(values))]) if isinstance(values, dict) else values
        for name, values in made.items()
    }


def _changed(name: str, x: Values, config: dict[str, Any]) -> Iterator[tuple[str, Values]]:
    family, end = config["model_type"], name.rpartition("layers.")[2].partition(".")[2]
    at = f"blk.{name.rpartition('layers.')[2].partition('.')[0]}."
    if family in AROUND_ONE and name.endswith("norm.weight") and "linear_attn" not in name:
        x = x + 1
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if family in PERMUTED and heads:
        x = x.reshape(config[heads], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if "linear_attn" in name:
        yield from _delta_net(name, x, config)
    elif family == "gpt_oss" and "experts" in name:
        yield from _experts_of_gpt_oss(name, x)
    elif end.endswith("experts.gate_up_proj"):
        yield from zip((name.replace("gate_up", part) for part in ("gate", "up")), np.split(x, 2, 1), strict=True)
    elif end.endswith("input_linear.weight"):
        kind = "exps" if "block_sparse" in end else "shexp" if config["num_local_experts"] else ""
        parts = (f"{at}ffn_{part}{'_' if kind else ''}{kind}.weight" for part in ("gate", "up"))
        yield from zip(parts, np.split(x, 2, -2), strict=True)
    elif end == "shared_mlp.output_linear.weight" and not config["num_local_experts"]:
        yield f"{at}ffn_down.weight", x
    elif "query_key_value" in end:
        yield name, x.reshape(config["num_attention_heads"], 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    elif ".feed_forward.experts" in name:
        yield name.removeprefix("model."), x
    elif end in ("self_attn.sinks", "layer_scalar"):
        yield f"{name}.weight", x
    elif end.endswith("expert_bias"):
        yield f"{name}.bias", x
    elif end == "conv.conv.weight":
        yield name, x.squeeze(1)
    else:
        yield name, x


def _experts_of_gpt_oss(name: str, x: Values) -> Iterator[tuple[str, Values]]:
    """Gate and up alternate in checkpoints, and weights are transposed."""
    x = x if name.endswith("_bias") else x.swapaxes(1, 2)
    end = ".bias" if name.endswith("_bias") else ".weight"
    module = name.removesuffix("_bias")
    if "gate_up" in module:
        yield module.replace("gate_up", "gate") + end, x[:, ::2]
        yield module.replace("gate_up", "up") + end, x[:, 1::2]
    else:
        yield module + end, x


def _delta_net(name: str, x: Values, config: dict[str, Any]) -> Iterator[tuple[str, Values]]:
    """Heads of values lie by their heads of keys in checkpoints, and by turns in files of Qwen3.5."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith("in_proj_qkvz.weight"):
        shared = heads // keys * value_dim
        by_head = x.reshape(keys, -1, x.shape[-1])
        q, k, v, z = np.split(by_head, np.cumsum([key_dim, key_dim, shared]), 1)
        at = f"blk.{name.split('.')[2]}."
        yield f"{at}attn_qkv.weight", np.concatenate([part.reshape(-1, x.shape[-1]) for part in (q, k, v)])
        yield f"{at}attn_gate.weight", z.reshape(-1, x.shape[-1])
        return
    x = x.squeeze(1) if "conv1d" in name else x
    if "in_proj_ba" not in name and config["model_type"] != "qwen3_next":

        def tiled(rows: Values) -> Values:
            return rows.reshape(keys, heads // keys, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

        first = 2 * keys * key_dim
        if "in_proj_qkv" in name or "conv1d" in name:
            x = np.concatenate([x[:first], tiled(x[first:])])
        elif "out_proj" in name:
            x = tiled(x.T).T
        elif "norm" not in name:
            x = tiled(x)
    if name.endswith("A_log"):
        x = -np.exp(x)
    yield name.replace("dt_bias", "dt_proj.bias"), x
