"""How much memory loading a checkpoint of several gigabytes takes, while its weights are rounded to 8 bits.

    python benchmarks/load_memory.py [--folder DIR] [SHAPE...]

Writes a checkpoint of noise for each shape (16 GB for llama-3-8b, deleted afterwards), loads it with w8a8-int8 on the
CPU in a process of its own, and asks Linux every few milliseconds how much anonymous memory that process has. Mapped
files count apart: the system takes their pages back. The limit is the weights as they are kept, one layer as it is
stored, and 300 MB for Python, libraries and what is passing. Takes some minutes; needs 12 GB of memory. Writes
`benchmarks/results/load_memory.md`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import conditions
from random_checkpoint import stored_bytes, write_random_checkpoint

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.own_engine import own_engine
from batchinfer.models.config import read_model_config
from batchinfer.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "load_memory.md"
SHAPES = ("llama-3-8b", "mixture-2b")
ROOM = 300e6
INTERVAL = 0.002  # seconds between two looks
HEAD = """\
# Memory while loading

Checkpoints of noise in bfloat16, rounded to w8a8-int8 while they are loaded; MB of anonymous memory. One run each,
looked at every {interval:.0f} ms. The limit is the weights as kept, one layer as stored, and {room:.0f} MB. Resident
memory also counts pages of mapped files. {conditions}.

| shape | checkpoint | weights as kept | one layer | limit | peak | holds | most resident |
|---|---:|---:|---:|---:|---:|---|---:|
"""


def main() -> None:
    """Write, load and delete a checkpoint of each shape; write the table. Exits with 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="folders in benchmarks/shapes")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; by default the system's for such")
    args = parser.parse_args()
    ran, holds, rows = conditions(), True, []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            model = write_random_checkpoint(HERE / "shapes" / shape / "config.json", Path(folder) / "model")
            peak, (kept, resident) = watched([sys.executable, __file__, "--load", str(model)])
            layer, size = layer_bytes(model), stored_bytes(model)
        limit = kept + layer + ROOM
        holds &= peak <= limit
        figures = [f"{n / 1e6:,.0f}" for n in (size, kept, layer, limit, peak, resident)]
        figures.insert(5, "yes" if peak <= limit else "NO")
        rows.append(f"| {' | '.join([shape, *figures])} |\n")
        print(rows[-1], end="", flush=True)
    head = HEAD.format(interval=INTERVAL * 1e3, room=ROOM / 1e6, conditions=", ".join(ran.values()))
    RESULTS.write_text(head + "".join(rows))
    sys.exit(not holds)


def load(model: Path) -> None:
    """Load the checkpoint as a job does, and print the bytes of its weights and of the most resident memory."""
    config = EngineConfig(model, quantization="w8a8-int8", max_model_len=64, kv_cache_tokens=64)
    stats = own_engine(config, Tokenizer.load(model)).stats()
    print(json.dumps([stats.weight_bytes, stats.peak_memory_bytes]))


def watched(command: list[str]) -> tuple[int, list[int]]:
    """Run a command; return (the most anonymous memory it was seen with, in bytes, and what it printed)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(INTERVAL)
    assert process.stdout is not None and process.returncode == 0
    return most, json.loads(process.stdout.read())


def anonymous_bytes(process: int) -> int:
    """The anonymous memory of a process; 0 if it is gone."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def layer_bytes(model: Path) -> int:
    """Bytes of the largest layer, two for each number."""
    return max(2 * sum(math.prod(shape) for _, shape in layer.tensors()) for layer in read_model_config(model).layers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(Path(sys.argv[2]))
    else:
        main()
