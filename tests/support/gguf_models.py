"""Checkpoints of transformers as GGUF files, written by the format's own library."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Q
from gguf_texts import TEXTS
from safetensors.torch import load_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers


def train(cut: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=318, initial_alphabet=alphabet, special_tokens=["<|bos|>", "<|end|>"])
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def add_byte_level(writer: gguf.GGUFWriter, made: tokenizers.Tokenizer, pre: str | None) -> None:
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(pre: str) -> tokenizers.Tokenizer:
    if pre == "gpt-2":
        return train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    words = Regex(LLAMA_WORDS.replace("{1,3}", "") if pre == "qwen2" else LLAMA_WORDS)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), whole])
    return train(cut, normalizers.NFC() if pre == "qwen2" else None)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
AROUND = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
    "model.embed_tokens_per_layer": "per_layer_token_embd", "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.per_layer_model_projection": "per_layer_model_proj", "layer_scalar": "layer_output_scale",
}  # fmt: skip
"""Names in a layer that has norms on both sides of its blocks, and of what Gemma 4 has beside them."""
ADDED = ("gemma", "gemma2", "gemma3_text")
"""Families whose checkpoints hold the distance from 1 of the weights of norms."""


def add_gemma4(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    own, count = config["per_layer_config"], config["num_hidden_layers"]
    full = next(iter(own.values()))
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_sliding_window_pattern(windows)
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    usual, heads = config["intermediate_size"], config["num_key_value_heads"]
    if config["use_double_wide_mlp"]:
        first = count - config["num_kv_shared_layers"]
        writer.add_feed_forward_length([usual if i < first else 2 * usual for i in range(count)])
    if "num_key_value_heads" in full:
        writer.add_head_count_kv([heads if window else full["num_key_value_heads"] for window in windows])
    part = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    half = full["head_dim"] // 2
    turned = int(half * part)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (half - turned), np.float32))


def write_model(
    path: Path, model: Path, kind: str, pre: str = "gpt-2", tensors_a_file: int = 0, **divisors: np.ndarray
) -> None:
    """A checkpoint of transformers as the format's own converter lays it out; in one file unless told otherwise."""
    config = json.loads((model / "config.json").read_text())
    family = config["model_type"]
    architecture = {"mistral": "llama", "gemma3_text": "gemma3", "gemma4_text": "gemma4"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if family in ("gemma2", "gemma3_text", "gemma4_text"):
        writer.add_sliding_window(config["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if family == "gemma4_text":
        add_gemma4(writer, config)
    elif config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    add_byte_level(writer, byte_level(pre), pre)
    names = NAMES | AROUND if family in ("gemma2", "gemma3_text", "gemma4_text") else NAMES
    for name, tensor in load_file(model / "model.safetensors").items():
        name = f"{name}.weight" if name.endswith("layer_scalar") else name
        module, _, end = name.rpartition(".")
        rest = module.removeprefix("model.layers.").partition(".")
        stored = (
            f"blk.{rest[0]}.{names[rest[2]]}.{end}" if module.startswith("model.layers.") else f"{names[module]}.{end}"
        )
        values = tensor.float().numpy() + (family in ADDED and module.endswith("norm"))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and family in ("granite", "llama", "mistral", "smollm3"):
            rows = values.reshape(config[heads], 2, -1, *values.shape[1:])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, Q[kind]), raw_dtype=Q[kind])
    for name, value in divisors.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
