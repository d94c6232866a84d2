"""What `own_process` sets, each in a process of its own, beside what an engine alone leaves as it was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import json, os, sys
from pathlib import Path
import torch
from torch.nn import functional as F

torch.set_num_threads(1)
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.host import allocator
from batchinfer.text.tokenizer import Tokenizer

class NoText(Tokenizer):
    def __init__(self): self.vocab_size, self.eos_ids = 320, (1,)

said = []
allocator._mallopt = lambda parameter, value: said.append(parameter)
make = {"engine": Engine, "own": own_engine}[sys.argv[1]]
engine = make(EngineConfig(Path(sys.argv[2]), max_model_len=64, kv_cache_tokens=64), NoText())
x, weight = torch.randn(512, 777), torch.randn(1000, 777)
whole = F.linear(x, weight)
print(json.dumps({
    "kept": all(F.linear(x[:rows], weight).equal(whole[:rows]) for rows in (8, 16, 64, 256)),
    "notes": engine.stats().notes,
    "threads": torch.get_num_threads(),
    "mallopt": len(said),
    "MKL_CBWR": os.environ.get("MKL_CBWR"),
}))
"""


def child(how: str, model: Path, **environment: str) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", CHILD, how, str(model)]
    out = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out)
    return found


def test_an_engine_with_its_own_process_keeps_bits_and_takes_all_processors(make_model: Callable[..., Path]) -> None:
    found = child("own", make_model("llama"))
    assert found["kept"] and found["notes"] == []
    assert found["threads"] == len(os.sched_getaffinity(0)) and found["mallopt"] == 3


@pytest.mark.parametrize("strict", [False, True])
def test_an_engine_alone_changes_nothing_and_says_so_where_bits_are_not_kept(
    make_model: Callable[..., Path], strict: bool
) -> None:
    mode = {"MKL_CBWR": "AUTO,STRICT"} if strict else {}
    found = child("engine", make_model("llama"), **mode)
    assert (found["threads"], found["mallopt"], found["MKL_CBWR"]) == (1, 0, mode.get("MKL_CBWR"))
    assert found["kept"] == (found["notes"] == []), "the note is there just where the products ask for it"
    assert found["kept"] or not strict or "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
