"""Loading quantizes tensor by tensor: the peak of resident memory, measured in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from repository import ROOT

CHILD = """
import json, sys
from pathlib import Path
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.own_engine import own_engine
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.text.tokenizer import Tokenizer

class NoText(Tokenizer):
    def __init__(self): self.vocab_size, self.eos_ids = 320, (1,)

before = peak_memory_bytes()
config = EngineConfig(Path(sys.argv[1]), quantization="w8a8-int8", max_model_len=64, kv_cache_tokens=64)
engine = own_engine(config, NoText())
stats = engine.stats()
print(json.dumps([before, stats.peak_memory_bytes, stats.weight_bytes]))
"""


def test_the_peak_while_loading_is_little_above_the_quantized_weights(make_model: Callable[..., Path]) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    model = make_model("llama", dtype="bfloat16", **shape)
    size = (model / "model.safetensors").stat().st_size
    out = subprocess.run([sys.executable, "-c", CHILD, model], capture_output=True, text=True, check=True).stdout
    before, peak, weights = json.loads(out)
    assert weights < 0.51 * size + 4e6
    # The largest product while it is quantized: gate and up, in float32 one by one.
    room = 2 * 4096 * 1024 * 4
    assert peak - before < 1.3 * weights + room
    assert 1.3 * weights + room < size + weights, "or a loader that keeps the whole file would pass"


@pytest.mark.long
def test_the_852m_run_stays_within_its_memory(tmp_path: Path) -> None:
    """The workload that is measured beside other engines: what its report says of both processes."""
    report_path = tmp_path / "report.json"
    command = ["bench", "--model", "benchmarks/shapes/llama-852m", "--random-weights", "--quantization", "w8a8-int8"]
    lengths = ["--num-prompts", "64", "--input-len", "64", "--output-len", "24"]
    program = Path(sys.executable).with_name("batchinfer")
    subprocess.run([program, *command, *lengths, "--output-json", report_path], cwd=ROOT, check=True)
    report = json.loads(report_path.read_text())["report"]
    # A byte for each number of the layers' matrices; embeddings and head are not quantized.
    matrices = 16 * ((3072 + 2048) * 2048 + 3 * 2048 * 5632)
    assert report["weight_bytes"] == pytest.approx(matrices + 2 * 32_000 * 2_048 * 2, rel=0.01)
    assert report["peak_memory_bytes"]["engine"] < 1.3 * report["weight_bytes"] + report["kv_cache_bytes"] + 500e6
    assert report["peak_memory_bytes"]["parent"] < 400e6
