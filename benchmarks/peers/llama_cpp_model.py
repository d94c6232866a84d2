"""Write the shape with random weights as a GGUF file in 16 bits. Runs in llama.cpp's environment."""

import sys
from pathlib import Path

import gguf
import numpy as np
from workload import Shape


def main(path: Path) -> None:
    shape = Shape.load()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    generator = np.random.default_rng(0)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        weights = generator.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(f"{name}.weight", weights.astype(np.float16))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden_size, dtype=np.float32))

    query_width = shape.num_attention_heads * shape.head_dim
    key_width = shape.num_key_value_heads * shape.head_dim
    add_matrix("token_embd", shape.vocab_size, shape.hidden_size)
    for layer in range(shape.num_hidden_layers):
        add_norm(f"blk.{layer}.attn_norm")
        add_matrix(f"blk.{layer}.attn_q", query_width, shape.hidden_size)
        add_matrix(f"blk.{layer}.attn_k", key_width, shape.hidden_size)
        add_matrix(f"blk.{layer}.attn_v", key_width, shape.hidden_size)
        add_matrix(f"blk.{layer}.attn_output", shape.hidden_size, query_width)
        add_norm(f"blk.{layer}.ffn_norm")
        add_matrix(f"blk.{layer}.ffn_gate", shape.intermediate_size, shape.hidden_size)
        add_matrix(f"blk.{layer}.ffn_up", shape.intermediate_size, shape.hidden_size)
        add_matrix(f"blk.{layer}.ffn_down", shape.hidden_size, shape.intermediate_size)
    add_norm("output_norm")
    add_matrix("output", shape.vocab_size, shape.hidden_size)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
