"""One pool of threads for torch and the kernels in C, beside what a second pool and too many threads would cost.

    python benchmarks/cpu_threads.py [--rows N] [--new N] [--turns N] [--write]

Counts the threads of the process before and after the kernels in C have run. Then the same engine decodes, in turns,
with the kernels in C on torch's OpenMP pool, as always; on the pool of a second OpenMP library (a copy of torch's own,
which the loader takes for another); and on torch's pool with twice as many threads. `--write` puts the page into
`benchmarks/results/cpu_threads.md`.
"""

import argparse
import ctypes
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from conditions import conditions

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.host.own_process import own_process
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path, load
from batchinfer.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
SHAPE = HERE / "shapes" / "llama-852m"
RESULTS = HERE / "results" / "cpu_threads.md"
PROMPT = 64
SHARED, SECOND, DOUBLED = "torch's pool", "a second pool", "torch's pool, twice the threads"


def main() -> None:
    """Count threads, decode in turns, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if (path := cpu_path()) == REFERENCE:
        parser.error("no kernels in C run here")
    own_process()
    if (threads := torch.get_num_threads()) == 1:
        parser.error("torch computes on one thread here, so there is no pool to share")
    ran = conditions()
    counts = {"torch loaded": os_threads()}
    torch.randn(2048, 2048) @ torch.randn(2048, 2048)
    counts["torch has multiplied"] = os_threads()
    engine = make_engine(args.rows, PROMPT + args.new)
    counts["engine made"] = os_threads()
    decode(engine, args.rows, args.new)
    counts["kernels in C have decoded"] = os_threads()

    library, own = load(path), openmp()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as folder:
        other = shutil.copy(own, folder)
        pools = {SHARED: (own, threads), SECOND: (other, threads), DOUBLED: (own, 2 * threads)}
        for _ in range(args.turns):
            for name, (file, count) in pools.items():
                library.set_threads(ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, ctypes.c_void_p), count)
                decode(engine, args.rows, 2)  # the threads are made
                seconds.setdefault(name, []).append(decode(engine, args.rows, args.new))
                counts.setdefault(f"decoded on {name}", os_threads())
                print(f"{name}: {1e3 * seconds[name][-1]:.1f} ms a step", file=sys.stderr, flush=True)
    page = f"""# Threads on a CPU

Threads of the process, where torch and the kernels in C ({path}) compute on {threads}; those of a
second pool stay once they are made:

| when | threads |
|---|---:|
{chr(10).join(f"| {when} | {count} |" for when, count in counts.items())}

Milliseconds of a step in which {args.rows} rows decode, `w8a8-int8+head` on the 852M shape, random weights: median of
{args.turns} turns, each the median of {args.new - 1} steps, with the least and the most.

| the kernels in C compute on | milliseconds | ratio |
|---|---:|---:|
{chr(10).join(line(name, times, seconds[SHARED]) for name, times in seconds.items())}

Printed by `python benchmarks/cpu_threads.py`. {ran["machine"]}; {ran["versions"]}; {ran["commit"]}; {ran["date"]}.
"""
    print(page)
    if args.write:
        RESULTS.write_text(page)


def os_threads() -> int:
    """Return how many threads the operating system sees in this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def openmp() -> Path:
    """Return the OpenMP library that torch computes on."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}
    return Path(next(file for file in sorted(files) if file.startswith(str(Path(torch.__file__).parent))))


def make_engine(rows: int, length: int) -> Engine:
    """Return an engine of random weights on which all rows decode side by side."""

    class Numbers(Tokenizer):
        def __init__(self) -> None:
            self.vocab_size, self.eos_ids = 32_000, (2,)

    pool = rows * -(-length // 32) * 32
    settings: dict[str, Any] = {"max_model_len": length, "kv_cache_tokens": pool, "random_weights": True}
    settings |= {"quantization": "w8a8-int8+head", "speculation": Speculation("off")}
    return own_engine(EngineConfig(SHAPE, **settings), Numbers())


def decode(engine: Engine, rows: int, new: int) -> float:
    """Answer `rows` prompts; return the median seconds of the steps that had no prompts."""
    prompts = torch.randint(3, 32_000, (rows, PROMPT)).tolist()
    engine.add(Requests.of(prompts, SamplingParams(max_tokens=new, ignore_eos=True)))
    steps = []
    while engine.unfinished:
        began, read = time.perf_counter(), engine.stats().prompt_tokens
        engine.step()
        if engine.stats().prompt_tokens == read:
            steps.append(time.perf_counter() - began)
    return statistics.median(steps)


def line(name: str, times: list[float], shared: list[float]) -> str:
    """Return a pool's line of the page."""
    told = f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
    return f"| {name} | {told} | {statistics.median(times) / statistics.median(shared):.2f} |"


if __name__ == "__main__":
    main()
