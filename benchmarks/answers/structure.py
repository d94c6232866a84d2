"""What it costs to hold answers to a grammar, and what it saves where a grammar forces tokens, on the demo model.

    python benchmarks/answers/structure.py [--repeats N]

The engines are in one process and run in turns, without speculation, so only their ratios mean something. Writes
`benchmarks/results/structure.json` and `.md`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conditions import conditions

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "stdlib" / "target"
RESULTS = ROOT / "benchmarks" / "results" / "structure"
ROWS, PROMPT, NEW = 64, 48, 64
TEXT = {"type": "object", "properties": {"text": {"type": "string", "minLength": 3000}}, "required": ["text"]}
RECORD = {
    "type": "object",
    "properties": {
        "function": {"type": "string", "maxLength": 24},
        "description": {"type": "string", "maxLength": 60},
        "arguments": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["function", "method", "property"]},
        "deprecated": {"type": "boolean"},
    },
    "required": ["function", "description", "arguments", "kind", "deprecated"],
}
# Case -> params of its rows, whether forced tokens are taken without the model, and the case that it is set beside.
CASES: dict[str, tuple[SamplingParams, bool, str]] = {
    "free text": (SamplingParams(max_tokens=NEW, temperature=1.0, ignore_eos=True), False, "free text"),
    "any text, by an expression": (
        SamplingParams(max_tokens=NEW, temperature=1.0, regex="(?s:.){4000}"), False, "free text"
    ),
    "text in JSON": (
        SamplingParams(max_tokens=NEW, temperature=1.0, json_schema=json.dumps(TEXT)), False, "free text"
    ),
    "records": (SamplingParams(max_tokens=200, temperature=1.0, json_schema=json.dumps(RECORD)), False, "free text"),
    "records, forced tokens taken": (
        SamplingParams(max_tokens=200, temperature=1.0, json_schema=json.dumps(RECORD)), True, "records"
    ),
}  # fmt: skip


def main() -> None:
    """Run the cases in turns, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    ran = conditions()
    tokenizer = Tokenizer.load(TARGET)
    most = ROWS * 256
    config = EngineConfig(TARGET, dtype="float32", max_model_len=256, max_num_seqs=ROWS, kv_cache_tokens=most)
    engines = {
        forces: own_engine(
            EngineConfig(**{**vars(config), "forced_tokens": forces, "speculation": Speculation("off")}), tokenizer
        )
        for forces in (False, True)
    }
    rng = np.random.default_rng(0)
    prompts = rng.integers(8, tokenizer.vocab_size, (ROWS, PROMPT)).tolist()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    tokens: dict[str, int] = {}
    for turn in range(-1, repeats):  # the first one warms up
        for case, (params, forces, _) in CASES.items():
            took, tokens[case] = answer(engines[forces], Requests.of(prompts, params, seeds=range(ROWS)))
            if turn >= 0:
                seconds[case].append(took)
        print(f"turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    rates = {case: [tokens[case] / took for took in seconds[case]] for case in CASES}
    page = _page(rates, tokens, ran, repeats)
    RESULTS.with_suffix(".json").write_text(
        json.dumps({**ran, "repeats": repeats, "tokens": tokens, "seconds": seconds}, indent=2) + "\n"
    )
    RESULTS.with_suffix(".md").write_text(page)
    print(page)


def answer(engine: Engine, requests: Requests) -> tuple[float, int]:
    """Return (seconds, new tokens) of the rows' answers."""
    started, before = time.perf_counter(), engine.stats().completion_tokens
    for _ in engine.generate(requests):
        pass
    return time.perf_counter() - started, engine.stats().completion_tokens - before


def _page(rates: dict[str, list[float]], tokens: dict[str, int], ran: dict[str, str], repeats: int) -> str:
    lines = [
        "# Answers that follow a grammar",
        "",
        f"The demo model in float32, {ROWS} rows side by side with prompts of {PROMPT} tokens, at temperature 1. New "
        f"tokens a second beside another case of the same turn: medians of {repeats} turns, (least to most). "
        f"{', '.join(ran.values())}.",
        "",
        "| answers | new tokens | rate | beside |",
        "|---|---:|---:|---|",
    ]
    for case, (_, _, other) in CASES.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[case], rates[other], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {case} | {tokens[case]:,} | {'1' if case == other else spread} | {other} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
