"""GGUF files against the format's own library and transformers; a damaged file gives a one-line error."""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from engines import compare_logits, engine_of, prompts_of
from gguf import GGMLQuantizationType as Q
from gguf_models import TEXTS, add_byte_level, byte_level, write_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors

from batchinfer.formats.gguf_file import TYPES as FORMAT_TYPES
from batchinfer.models.gguf_folder import unpack_gguf
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer


def test_a_head_in_the_file_is_used_whatever_the_checkpoint_tied(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(make_model("llama", tie_word_embeddings=True), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    write_model(tmp_path / "a.gguf", model, "F32")
    unpack_gguf(tmp_path / "a.gguf", tmp_path / "unpacked")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for ours, expected in compare_logits(engine_of(tmp_path / "unpacked"), oracle, prompts_of(4, 60)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_file_on_the_hub_is_as_one_that_lies_here(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached, commit = tmp_path / "models--org--name", "0123456789" * 4
    file = cached / "snapshots" / commit / "q8" / "m.gguf"
    file.parent.mkdir(parents=True)
    write_model(file, make_model("llama"), "Q8_0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    folder = resolve_model("org/name/q8/m.gguf", None)
    assert (folder / "model.gguf").resolve() == file and folder == resolve_model(str(file), None)
    assert len(engine_of(folder, Tokenizer.load(folder)).runner.decoder.config.layers) == 3


def test_divisors_of_rope_are_llama_3_scaling(make_model: Callable[..., Path], tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = make_model("llama", rope_parameters=scaling)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    divisors = (plain / oracle.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write_model(tmp_path / "a.gguf", model, "F32", rope_freqs=divisors)
    unpack_gguf(tmp_path / "a.gguf", tmp_path / "unpacked")
    for ours, expected in compare_logits(engine_of(tmp_path / "unpacked"), oracle, prompts_of(8, 200)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_byte_level_tokenizers_come_out_as_they_went_in(tmp_path: Path, pre: str, adds_bos: bool) -> None:
    made = byte_level(pre)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_byte_level(writer, made, pre)
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    unpacked = unpack_tokenizer(writer, tmp_path)
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    ids, offsets = unpacked.encode_batch(TEXTS)
    for i, text in enumerate(TEXTS):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == made.encode(text).ids
    assert unpacked.eos_ids == (1,)
    chat, _, errors = unpacked.encode_chats([[{"role": "user", "content": "Hello"}]])
    assert not errors and chat[0] == 0 and chat[-1] == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.value_length", 8),
        ("rope.dimension_count", 8),
        ("rope.scale_linear", 4.0),
        ("rope.scaling.attn_factor", 2.0),
        ("rope.scaling.yarn_beta_fast", 4.0),
    ],
)
def test_an_entry_that_changes_the_result_is_refused(tmp_path: Path, key: str, value: float) -> None:
    """Refuse each entry with which llama.cpp v0.5.0 gives other probabilities, or refuses the file."""
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_byte_level(writer, byte_level("gpt-2"), "gpt-2")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
    add(f"llama.{key}", value)
    with pytest.raises(ValueError, match=rf"llama\.{key} is '{value}'; supported is .*: take the model in the"):
        unpack_tokenizer(writer, tmp_path)


def unpack_tokenizer(writer: gguf.GGUFWriter, tmp_path: Path) -> Tokenizer:
    """Through a file that has the least of a model in it."""
    for name, value in (("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 32)):
        writer.add_uint32(f"llama.{name}", value)
    for name, value in (("block_count", 1), ("attention.head_count", 2)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ("token_embd", "blk.0.ffn_gate"):
        writer.add_tensor(f"{name}.weight", np.zeros((320, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unpack_gguf(tmp_path / "t.gguf", tmp_path / "unpacked")
    return Tokenizer.load(tmp_path / "unpacked")


def test_a_sentencepiece_tokenizer_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = [
        "▁",
        *"helowrdtaiscn,.!",
        "he",
        "ll",
        "hell",
        "hello",
        "▁he",
        "▁hello",
        "▁w",
        "or",
        "wor",
        "▁wor",
        "ld",
        "▁world",
        "▁▁",
    ]
    scores = [0.0] * len(pieces) + [-float(i) for i in range(len(words))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    unpacked = unpack_tokenizer(writer, tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    texts = ["hello world", "hell o, world!", "hello  hello", "naïve 漢", "wworldd\nhello."]
    ids, offsets = unpacked.encode_batch(texts)
    for i, text in enumerate(texts):
        row = ids[offsets[i] : offsets[i + 1]]
        assert row.tolist() == oracle(text)["input_ids"]
        assert unpacked.decode_batch(row, np.array([0, len(row)]))[0] == text
    # A space goes before every text, one that begins with spaces too, as SentencePiece has it.
    two_spaces_hello = [(pieces + words).index(piece) for piece in ("<s>", "▁▁", "▁hello")]
    assert unpacked.encode_batch(["  hello"])[0].tolist() == two_spaces_hello


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_model(path, make_model("llama", num_hidden_layers=1), "Q8_0")
    return path.read_bytes()


def opened(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        unpack_gguf(path, tmp_path / "unpacked-broken")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 * len(data) + 1_000_000


@given(data=st.data())
def test_no_damage_gives_more_than_a_clear_line(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    broken = bytearray(small)
    if data.draw(st.booleans(), label="truncate"):
        del broken[data.draw(st.integers(0, len(small) - 1)) :]
    else:
        header = 12_000
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, header))
            broken[at : at + 8] = struct.pack(
                "<Q", data.draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            )
    try:
        opened(bytes(broken), tmp_path_factory.getbasetemp())
    except ValueError as error:
        assert "broken.gguf" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1; supported are 2 and 3"),
        (8, struct.pack("<Q", 2**60), r"claims \d+ tensors"),
        (16, struct.pack("<Q", 2**60), r"claims \d+ metadata entries"),
    ],
)
def test_claims_beyond_the_file_are_refused(small: bytes, tmp_path: Path, at: int, value: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(small[:at] + value + small[at + len(value) :], tmp_path)
    with pytest.raises(ValueError, match="truncated or damaged"):
        opened(small[:-40], tmp_path)


def write_refused(path: Path, architecture: str, pre: str, **entries: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add_byte_level(writer, byte_level("gpt-2"), pre)
    for name, value in entries.items():
        writer.add_uint16(name.replace("_", "."), value)
    for name, kind, width in (("x", Q.TQ1_0, 54), ("y", Q.TQ1_0, 54), ("z", Q.IQ3_S, 110)):
        writer.add_tensor(name, np.zeros((1, width), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TYPES = (
    r"a.gguf has 1 tensor of type IQ3_S \(z\), 2 tensors of type TQ1_0 \(x, ...\); supported are F32, F16, BF16, Q4_0, "
    "Q4_1, .*, IQ4_XS, MXFP4: take another quantization of the model$"
)


@pytest.mark.parametrize("kind", sorted(set(Q) - FORMAT_TYPES.keys()))
def test_each_type_of_the_library_that_is_not_supported_is_known_by_name(tmp_path: Path, kind: Q) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor("x", np.zeros((1, 256 // elements * nbytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"1 tensor of type {kind.name} \(x\); .*take another quantization"):
        unpack_gguf(tmp_path / "a.gguf", tmp_path / "unpacked", tokenizer=False)


def test_what_is_not_supported_is_refused_by_name_and_at_once(tmp_path: Path) -> None:
    """The type of the model first, because nothing else helps then."""
    with pytest.raises(
        ValueError, match=r"a.gguf: general.architecture is 'mamba'; supported are arcee, chatglm, [^;]*$"
    ):
        unpack_gguf(write_refused(tmp_path / "a.gguf", "mamba", "smaug"), tmp_path / "unpacked")
    path = write_refused(tmp_path / "a.gguf", "llama", "smaug")
    with pytest.raises(ValueError, match=rf"tokenizer.ggml.pre is 'smaug'; .* with --tokenizer; and .*{TYPES}"):
        unpack_gguf(path, tmp_path / "unpacked")
    with pytest.raises(ValueError, match=TYPES):
        unpack_gguf(path, tmp_path / "unpacked", tokenizer=False)
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("more", [(), ("<|return|>", "<|call|>")], ids=["", "harmony"])
def test_the_end_of_a_turn_is_known_by_its_text(tmp_path: Path, more: tuple[str, ...]) -> None:
    """The file names only the end of the text, and has the others as ordinary tokens."""
    made = byte_level("gpt-2")
    made.add_tokens(["<|im_end|>", "<|endoftext|>", "<|im_start|>", *more])
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    texts = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([1] * len(texts))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]])
    writer.add_eos_token_id(0)
    unpacked = unpack_tokenizer(writer, tmp_path)
    ends = {"<|im_end|>", "<|endoftext|>", *(more or ("<|end|>",))}
    assert [texts[i] for i in unpacked.eos_ids] == sorted({texts[0], *ends}, key=texts.index)
    ids, _ = unpacked.encode_batch(["<|im_end|>"], allow_special_tokens=True)
    assert ids.tolist() == [texts.index("<|im_end|>")]
    assert unpacked.decode_batch(ids, np.array([0, 1])) == [""]
