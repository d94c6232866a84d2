"""What choosing from labels costs, beside one and four generated tokens: `make bench-answers`.

    python benchmarks/answers/labels.py [--rows 4,256] [--unique 16,64,256] [--repeats 3] [--write]

The 852M shape with random weights in 8 bits. All prompts begin with one template; so many tokens of each are its own.
There are eight labels of one to four tokens, twice each, and no two begin alike: the most that can be asked of so many.
The three ways take turns on one engine. `tokens` is what arithmetic says: the tokens that each way computes of a row,
set against those of one new token.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conditions import conditions

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.engine.request import Choices, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
SHAPE = HERE.parent / "shapes" / "llama-852m"
TARGET = HERE.parents[1] / "examples" / "stdlib" / "target"
RESULTS = HERE.parent / "results" / "labels.md"
TEMPLATE = 128  # tokens
SIZES = (1, 2, 3, 4)
LABELS = [[100 * i + size + n for n in range(size)] for i, size in enumerate(SIZES * 2, 1)]
WAYS = ("one token", "four tokens", "labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="4,256")
    parser.add_argument("--unique", default="16,64,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    here = conditions()
    rows, unique = ([int(n) for n in text.split(",")] for text in (args.rows, args.unique))
    length = TEMPLATE + max(unique) + 8
    config = EngineConfig(
        SHAPE,
        quantization="w8a8-int8",
        max_model_len=length,
        max_num_seqs=max(64, *rows),
        expected_batch=max(64, *rows),
        kv_cache_tokens=max(64, *rows) * length,
        random_weights=True,
        speculation=Speculation("off"),
    )
    engine = own_engine(config, Tokenizer.load(TARGET))
    lines = [
        "| rows | own tokens | one token, s | four tokens / one | labels / one | spread | tokens | labels / four |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in rows:
        for own in unique:
            lines.append(_row(engine, count, own, args.repeats))
            print(lines[-1], file=sys.stderr, flush=True)
    about = (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip()
    page = [
        "# What choosing from labels costs",
        "",
        about,
        "",
        f"Printed by `python benchmarks/answers/labels.py`. Machine: {here['machine']}; {here['versions']}; "
        f"{here['commit']}; {here['date']}; medians of {args.repeats} turns.",
        "",
        *lines,
    ]
    print("\n".join(page))
    if args.write:
        RESULTS.write_text("\n".join(page) + "\n")


def _row(engine: Engine, count: int, own: int, repeats: int) -> str:
    """Measure the ways in turns; return a line of the table."""
    ways = _ways(count, own)
    for requests in ways.values():  # oneDNN makes its kernels at the first step of a size
        _seconds(engine, requests)
    seconds = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            seconds[way].append(_seconds(engine, ways[way]))
    labels, four = (
        [a / b for a, b in zip(seconds[way], seconds["one token"], strict=True)] for way in ("labels", "four tokens")
    )
    to_four = [a / b for a, b in zip(seconds["labels"], seconds["four tokens"], strict=True)]
    shared = TEMPLATE / count
    expected = (shared + own + sum(map(len, LABELS))) / (shared + own)
    return (
        f"| {count} | {own} | {statistics.median(seconds['one token']):.2f} | {statistics.median(four):.2f} | "
        f"{statistics.median(labels):.2f} | {min(labels):.2f} to {max(labels):.2f} | {expected:.2f} | "
        f"{statistics.median(to_four):.2f} |"
    )


def _ways(count: int, own: int) -> dict[str, Requests]:
    rng = np.random.default_rng(0)
    template = rng.integers(2, 4000, TEMPLATE).tolist()
    prompts = [[*template, *rng.integers(2, 4000, own).tolist()] for _ in range(count)]
    one, four = (Requests.of(prompts, SamplingParams(max_tokens=n, ignore_eos=True)) for n in (1, 4))
    return dict(zip(WAYS, (one, four, replace(one, choices=Choices.of([LABELS] * count))), strict=True))


def _seconds(engine: Engine, requests: Requests) -> float:
    began = time.perf_counter()
    done = sum(len(completions) for completions in engine.generate(requests))
    assert done == len(requests)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
