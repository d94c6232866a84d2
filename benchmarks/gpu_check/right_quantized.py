"""Engines with quantized weights against transformers in float32 on what the quantized numbers stand for."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check.engines import release
from gpu_check.right_engine import WORSE, engine_on, last_logits, logits_of, oracle, relative_error, write_model
from gpu_check.session import SHAPES, Session
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TITLE = "Logits of quantized engines against transformers on the same numbers"
MOST = {"int8": 127.0, "fp8": 448.0}


def run(session: Session) -> None:
    """8-bit weights and activations, and 4-bit weights; the model of noise that other parts have."""
    lengths = session.pick((1, 33, 64, 129, 400), (1, 65))
    vocab = session.pick(8192, 320)
    prompts = [np.random.default_rng(n).integers(2, vocab, n).tolist() for n in lengths]
    kinds = session.pick(("w4a16", "w8a8-fp8", "w8a8-int8"), ("w4a16", "w8a8-int8"))
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(session, Path(name))
        for kind in session.within_time(kinds):
            with session.case(f"logits in {kind}"):
                _check(session, folder, kind, prompts)
            release(session)
            session.say(kind)


def _check(session: Session, folder: Path, kind: str, prompts: list[list[int]]) -> None:
    dtype = session.dtype
    model, settings = folder, {"quantization": kind}
    if kind == "w4a16":
        model, settings = write_four_bits(session, folder), {"quantization": "auto"}
    pairs = list(logits_of(session, engine_on(session, model, dtype, **settings), prompts))
    exact, theirs = (_rounded(session, folder, kind, other) for other in (torch.float32, torch.bfloat16))
    known, ours = [tokens for tokens, _ in pairs], torch.stack([logits for _, logits in pairs])
    expected = torch.stack([last_logits(exact, tokens) for tokens in known])
    in_16_bits = torch.stack([last_logits(theirs, tokens) for tokens in known])
    error, other = relative_error(ours, expected), relative_error(in_16_bits, expected)
    columns = {"our error": error, "transformers' in bf16": other, "ratio": error / other}
    session.row(TITLE, kind=kind, positions=len(known), **columns)
    assert error <= WORSE * other, f"relative error {error:.2e} instead of at most {WORSE * other:.2e}"


def _rounded(session: Session, folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """transformers' model with weights as they are quantized, and rows rounded before each product if they are."""
    model = oracle(session, folder, dtype)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data.float()
        if kind == "w4a16":
            values, scale = four_bits(weight, session.pick(128, 32))
            module.weight.data = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).to(dtype)
        else:
            form = kind.removeprefix("w8a8-")
            module.weight.data = _eight_bits(weight, form).to(dtype)
            module.register_forward_pre_hook(
                lambda _, x, form=form, dtype=dtype: (_eight_bits(x[0].float(), form).to(dtype),)
            )
    return model


def _eight_bits(x: Tensor, form: str) -> Tensor:
    """Numbers rounded to 8 bits with a scale for each row."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / MOST[form]
    return (x / step).round() * step if form == "int8" else (x / step).to(torch.float8_e4m3fn).float() * step


def four_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(whole numbers from -8 to 7 [N, K], scales in bfloat16 [N, K / group]) as float32."""
    groups = weight.unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-12).bfloat16().float()
    return (groups / scale[..., None]).round().clamp(-8, 7).flatten(1), scale


def write_four_bits(session: Session, folder: Path) -> Path:
    """The model with its layers in 4 bits, eight numbers in a word, as compressed-tensors writes them."""
    packed = folder / "w4a16"
    packed.mkdir(exist_ok=True)
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            found[name] = tensor
            continue
        values, scale = four_bits(tensor.float(), session.pick(128, 32))
        nibbles = (values.to(torch.int64) + 8).unflatten(1, (-1, 8)) << (4 * torch.arange(8))
        words = nibbles.sum(-1)
        stem = name.removesuffix("weight")
        found[f"{stem}weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        found[f"{stem}weight_scale"] = scale.bfloat16()
        found[f"{stem}weight_shape"] = torch.tensor(tensor.shape)
    save_file(found, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = json.loads((SHAPES / "llama-3-8b-w4a16" / "config.json").read_text())["quantization_config"]
    for one in scheme["config_groups"].values():
        one["weights"]["group_size"] = session.pick(128, 32)
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    return packed
