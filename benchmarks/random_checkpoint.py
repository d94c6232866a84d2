"""A checkpoint of noise in the shape of a model, with the demo's tokenizer: for measuring time and memory.

python benchmarks/random_checkpoint.py SHAPE/config.json FOLDER
"""

import json
import shutil
import sys
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from batchinfer.models.config import parse_model_config

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "stdlib" / "target"


def write_random_checkpoint(shape: Path, folder: Path) -> Path:
    """Into `folder`, bfloat16 weights for `shape`, a file for each layer, and its config.json.

    Memory holds one layer at a time.
    """
    torch.manual_seed(0)
    folder.mkdir()
    weight_map: dict[str, str] = {}
    config = parse_model_config(json.loads(shape.read_text()))
    prefixes = tuple(layer.prefix for layer in config.layers)
    by_layer = groupby(config.tensors(), lambda entry: next(filter(entry[0].startswith, prefixes), None))
    for number, (_, sizes) in enumerate(by_layer):
        # Noise that is as large as keeps activations at their size from layer to layer.
        tensors = {
            name: torch.ones(size) if len(size) == 1 else torch.randn(size).div_(size[1] ** 0.5).bfloat16()
            for name, size in sizes
        }
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(shape, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    write_random_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
