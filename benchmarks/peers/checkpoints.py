"""The shape with random weights as checkpoints that `batchinfer quantize` writes: a folder for each scheme."""

import shutil
import sys
from pathlib import Path

from environment import FOLDER, run
from workload import SHAPE_DIR

CHECKPOINTS = FOLDER / ".env-checkpoints"


def checkpoint(scheme: str) -> Path:
    """Return the checkpoint in this scheme, rounded to nearest; write it where it is missing."""
    folder = CHECKPOINTS / scheme
    if not folder.exists():
        plain, unfinished = CHECKPOINTS / "plain", CHECKPOINTS / "unfinished"
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        for each in (plain, unfinished):
            shutil.rmtree(each, ignore_errors=True)
        script = Path(__file__).resolve().parents[1] / "random_checkpoint.py"
        run([sys.executable, str(script), str(SHAPE_DIR / "config.json"), str(plain)])
        program = Path(sys.executable).with_name("batchinfer")
        run([str(program), "quantize", str(plain), "-o", str(unfinished), "--scheme", scheme, "--method", "rtn"])
        shutil.rmtree(plain)
        unfinished.rename(folder)
    return folder
