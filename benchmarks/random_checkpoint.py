"""A checkpoint of noise in the shape of a model, with the demo's tokenizer: for measuring time and memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from batchinfer.models.config import parse_model_config

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "stdlib" / "target"


def write_random_checkpoint(shape: Path, folder: Path) -> Path:
    """Into `folder`, one file of bfloat16 weights for `shape`, and its config.json."""
    torch.manual_seed(0)
    # Noise that is as large as keeps activations at their size from layer to layer.
    tensors = {
        name: torch.ones(size) if len(size) == 1 else (torch.randn(size) / size[1] ** 0.5).bfloat16()
        for name, size in parse_model_config(json.loads(shape.read_text())).tensors()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(shape, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder
