"""Checkpoints with damage that nobody thought of: a refusal that names the file comes out, or a right result."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import CHATML
from chat_models import save as save_tokenizer
from gguf_models import write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from batchinfer.errors import Refused
from batchinfer.host.limits import limited
from batchinfer.models.config import read_model_config
from batchinfer.models.gguf_folder import unpack_gguf
from batchinfer.models.gguf_weights import GGUFWeights
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.text.tokenizer import Tokenizer

# The same examples each time: a test that fails once in a hundred runs tells nobody anything.
fuzz = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SECONDS, MEMORY = 20, 1 << 29  # of one example
MAX_MESSAGE = 2000  # characters


def refused_or_right(call: Callable[[], Any], named: Path) -> None:
    try:
        with limited(SECONDS, MEMORY):
            call()
    except (ValueError, Refused) as error:
        assert str(named) in str(error), "the refusal does not name the file"
        assert len(str(error)) < MAX_MESSAGE


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "\x00", "(", "re:(", "a" * 5000, 10**400, 1e308, 5e-324, 1.0])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """With another value in one or two places, or without one."""
    value: Any = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        found = [place for place in places(value) if place]
        if not found:
            return value
        *path, last = draw(st.sampled_from(found))
        parent = value
        for key in path:
            parent = parent[key]
        if draw(st.integers(0, 9)):
            parent[last] = draw(values)
        else:
            del parent[last]
    return value if draw(st.integers(0, 30)) else draw(values)


@st.composite
def flipped(draw: st.DrawFn, original: bytes, within: int) -> bytes:
    """With other bytes in a few places of the beginning, or cut off."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, within - 1))
        put = draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 63)])
        )
        data[at : at + len(put)] = put
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.integers(0, 4)) == 0 else bytes(data)


TENSORS = {"model.a": torch.ones(4, 3), "model.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(1)}
SAFETENSORS = save(TENSORS, {"format": "pt"})
HEADER = json.loads(SAFETENSORS[8 : 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]])


def read_weights(folder: Path) -> None:
    weights = SafetensorsWeights(folder)
    for name in weights.names():
        assert weights.read(name).isfinite().all()


@fuzz
@given(data=flipped(SAFETENSORS, len(SAFETENSORS)))
def test_bytes_of_safetensors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    refused_or_right(lambda: read_weights(tmp_path), tmp_path)


@fuzz
@given(header=mutated(HEADER), body=st.integers(0, 100))
def test_headers_of_safetensors(header: Any, body: int, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + b"\0" * (body if body < 20 else 56)
    (tmp_path / "model.safetensors").write_bytes(data)
    refused_or_right(lambda: read_weights(tmp_path), tmp_path)


INDEX = {"metadata": {"total_size": 56}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}


@fuzz
@given(index=mutated(INDEX))
def test_indexes_of_safetensors(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_or_right(lambda: read_weights(tmp_path), tmp_path)


SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": [1, 2], "dtype": "float32",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            "input_activations": {
                "num_bits": 8, "type": "int", "dynamic": True, "strategy": "group", "group_size": 32,
            },
        }
    },
    "ignore": ["lm_head", "re:.*head"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "transform_config": {
        "config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["re:.*"], "location": "weight_input"}]}}
    },
    "sparsity_config": {"format": "dense"},
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.0,
    "truncate": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
CONFIGS = [
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "rope_parameters": YARN},
    {"model_type": "llama", **SIZES, "rope_scaling": LLAMA3, "rope_theta": 1e6, "quantization_config": COMPRESSED},
    {"model_type": "mistral", **SIZES, "sliding_window": 40, "quantization_config": GPTQ},
    {
        "model_type": "qwen2", **SIZES, "sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1,
        "quantization_config": AWQ,
    },
    {
        "model_type": "qwen3", **SIZES, "layer_types": ["full_attention"] * 3, "quantization_config": FP8,
        "rope_parameters": {"rope_type": "divided", "divisors": [1.0] * 8},
    },
    {
        "model_type": "gemma4_text", **SIZES, "hidden_act": None,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1, "use_double_wide_mlp": True, "attention_k_eq_v": True, "head_dim": 16,
        "hidden_size_per_layer_input": 32, "per_layer_config": {"1": {"head_dim": 32}, "2": {"head_dim": 32}},
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
    },
]  # fmt: skip


def read_config(folder: Path) -> None:
    config = read_model_config(folder)
    for layer in config.layers:
        a = layer.attention
        assert a.heads % a.kv_heads == 0
        cos, _ = a.rope.tables(8)
        assert cos.shape == (8, a.head_dim // 2) and cos.isfinite().all()
    if config.form is not None:
        config.form.name.encode()


@pytest.mark.parametrize("original", CONFIGS, ids=lambda c: c["model_type"])
def test_the_configs_are_right_before_they_are_damaged(original: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(original))
    read_config(tmp_path)


@settings(fuzz, max_examples=400)
@given(config=st.sampled_from(CONFIGS).flatmap(mutated))
def test_config_json(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused_or_right(lambda: read_config(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("chat"), CHATML)
    (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


GENERATION = {"eos_token_id": [1, 2], "bos_token_id": 0, "temperature": 0.6}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
    "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}],
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}, "model_max_length": 512, "extra_token": "x",
}  # fmt: skip


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids, offsets = tokenizer.encode_batch(["Hello <s> 日本語", ""])
    assert len(offsets) == 3 and (ids >= 0).all()
    tokenizer.decode_batch(ids, offsets)
    if tokenizer.template is not None:
        tokenizer.encode_chats([[{"role": "user", "content": "Hello"}]])


def damaged(source: Path, target: Path, name: str, text: str) -> Path:
    """A copy of a tokenizer's folder with another text in one file."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / name).write_text(text)
    return target


@fuzz
@given(config=mutated(TOKENIZER_CONFIG))
def test_tokenizer_config_json(config: Any, chat_model: Path, tmp_path: Path) -> None:
    folder = damaged(chat_model, tmp_path, "tokenizer_config.json", json.dumps(config))
    refused_or_right(lambda: use_tokenizer(folder), folder)


@settings(fuzz, max_examples=60)
@given(config=mutated(GENERATION))
def test_generation_config_json(config: Any, chat_model: Path, tmp_path: Path) -> None:
    folder = damaged(chat_model, tmp_path, "generation_config.json", json.dumps(config))
    refused_or_right(lambda: use_tokenizer(folder), folder)


@settings(fuzz, max_examples=300)
@given(data=st.data())
def test_tokenizer_json(data: st.DataObject, chat_model: Path, tmp_path: Path) -> None:
    original = json.loads((chat_model / "tokenizer.json").read_text())
    original["model"]["merges"] = original["model"]["merges"][:3]
    original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[:300])
    text = json.dumps(data.draw(mutated(original)))
    folder = damaged(chat_model, tmp_path, "tokenizer.json", text)
    refused_or_right(lambda: use_tokenizer(folder), folder)


@pytest.fixture(scope="module")
def gguf_file(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(path, make_model("llama"), "Q8_0")
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_headers_of_gguf(data: st.DataObject, gguf_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data.draw(flipped(gguf_file, 400) | flipped(gguf_file, len(gguf_file) // 4)))

    def use() -> None:
        unpack_gguf(path, tmp_path / "folder")
        weights = GGUFWeights([path], read_model_config(tmp_path / "folder"))
        weights.take("output_norm.weight", (96,))
        use_tokenizer(tmp_path / "folder")

    refused_or_right(use, tmp_path)
