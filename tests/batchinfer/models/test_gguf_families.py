"""Every family that GGUF files hold: a file gives the logits that the checkpoint it was made of gives.

`tests/support/gguf_layout.py` lays files out. llama.cpp's own converter made the same entries and tensors of the same
checkpoints, and llama.cpp itself the same tokens.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from engines import compare_logits, engine_of, logits_of, prompts_of
from gguf_families import ADAPTED, gguf_case
from gguf_models import write_model

from batchinfer.models.gguf_folder import unpack_gguf


@pytest.mark.parametrize("case", ADAPTED)
def test_logits_are_those_of_transformers(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    family, fields = gguf_case(case)
    model = make_model(family, **fields)
    write_model(tmp_path / "m.gguf", model, "F32")
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "unpacked")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = engine_of(tmp_path / "unpacked", dtype="float32", max_model_len=128)
    for ours, expected in compare_logits(engine, oracle, prompts_of(3, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not engine.stats().notes


QUANTIZED = {
    "gpt_oss": "Q8_0, MXFP4", "granitemoeshared": "Q8_0, Q4_0", "lfm2": "Q8_0", "phi3": "Q5_1", "qwen3_5_text": "Q8_0",
    "qwen3_moe": "Q8_0, Q5_0", "qwen3_next": "Q8_0",
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_tensors_are_the_numbers_that_they_stand_for(
    make_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, fields = gguf_case(case)
    logits = []
    for expanded in (False, True):
        path = tmp_path / f"{expanded}.gguf"
        write_model(path, make_model(family, **fields), QUANTIZED[case], expanded=expanded)
        unpack_gguf(path, path.with_suffix(""))
        engine = engine_of(path.with_suffix(""), dtype="float32", max_model_len=128)
        logits.append(torch.stack([ours for _, ours in logits_of(engine, prompts_of(3, 100))]))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)
