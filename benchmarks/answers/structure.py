"""What it costs to hold answers to a grammar, and what it saves where a grammar forces tokens, on the demo model.

    python benchmarks/answers/structure.py [--repeats N]

The engines are in one process and run in turns, without speculation, so only their ratios mean something; above 1 is
faster than free text. Writes `benchmarks/results/structure.json` and `.md`.
"""

import argparse
import json
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
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "stdlib" / "target"
RESULTS = ROOT / "benchmarks" / "results" / "structure"
SIDE_BY_SIDE, PROMPT, NEW = (8, 64), 48, 64
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
FREE, AS_LONG = "free text", "free text, as long as the records"
# Case -> the field of `SamplingParams` with a grammar, whether forced tokens are taken without the model, and the case
# that it is set beside.
CASES: dict[str, tuple[dict[str, str], bool, str]] = {
    "any text, by an expression": ({"regex": "(?s:.){4000}"}, False, FREE),
    "text in JSON": ({"json_schema": json.dumps(TEXT)}, False, FREE),
    "records": ({"json_schema": json.dumps(RECORD)}, False, AS_LONG),
    "records, forced tokens taken": ({"json_schema": json.dumps(RECORD)}, True, AS_LONG),
}


def main() -> None:
    """Run the cases in turns, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    ran = conditions()
    tokenizer = Tokenizer.load(TARGET)
    most = max(SIDE_BY_SIDE)
    config = EngineConfig(
        TARGET, dtype="float32", max_model_len=256, max_num_seqs=most, kv_cache_tokens=most * 256,
        speculation=Speculation("off"),
    )  # fmt: skip
    engines = {forces: own_engine(replace(config, forced_tokens=forces), tokenizer) for forces in (False, True)}
    seconds: dict[str, dict[str, list[float]]] = {}
    for rows in SIDE_BY_SIDE:
        asked = _requests(engines[False], tokenizer, rows)
        taken = seconds[str(rows)] = {case: [] for case in asked}
        for turn in range(repeats):
            # There and back, so that no case always follows the same one.
            for case, requests in list(asked.items())[:: 1 if turn % 2 else -1]:
                forces = case in CASES and CASES[case][1]
                taken[case].append(_answer(engines[forces], requests)[0])
            print(f"{rows} rows, turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    RESULTS.with_suffix(".json").write_text(
        json.dumps({**ran, "repeats": repeats, "seconds": seconds}, indent=2) + "\n"
    )
    RESULTS.with_suffix(".md").write_text(_page(seconds, ran, repeats))
    print(RESULTS.with_suffix(".md").read_text())


def _requests(engine: Engine, tokenizer: Tokenizer, rows: int) -> dict[str, Requests]:
    """Return the requests of each case, all of which have been answered once."""
    prompts = np.random.default_rng(0).integers(8, tokenizer.vocab_size, (rows, PROMPT)).tolist()
    free = SamplingParams(max_tokens=NEW, temperature=1.0, ignore_eos=True)
    params = {FREE: free}
    for case, (grammar, _, _) in CASES.items():
        longest = 200 if case.startswith("records") else NEW
        params[case] = SamplingParams(max_tokens=longest, temperature=1.0, **grammar)  # type: ignore[arg-type]
    asked = {case: Requests.of(prompts, each, seeds=range(rows)) for case, each in params.items()}
    lengths = {case: _answer(engine, requests)[1] for case, requests in asked.items()}["records"]
    different = sorted(set(lengths))
    asked[AS_LONG] = replace(
        asked[FREE],
        params=SamplingTable.of([replace(free, max_tokens=length) for length in different]),
        param_index=np.searchsorted(different, lengths).astype(np.int32),
    )
    return asked


def _answer(engine: Engine, requests: Requests) -> tuple[float, list[int]]:
    """Return (seconds of processor time, number of new tokens of each row): other programs change that little."""
    started, lengths = time.process_time(), {}
    for done in engine.generate(requests):
        lengths |= dict(zip(done.rows.tolist(), np.diff(done.offsets).tolist(), strict=True))
    return time.process_time() - started, [lengths[row] for row in requests.rows.tolist()]


def _page(seconds: dict[str, dict[str, list[float]]], ran: dict[str, str], repeats: int) -> str:
    lines = [
        "# Answers that follow a grammar",
        "",
        f"The demo model in float32, prompts of {PROMPT} tokens, temperature 1. Processor time of free "
        f"text of the same lengths over theirs, in the same turn: medians of {repeats} turns, (least to "
        f"most). {', '.join(ran.values())}.",
        "",
        f"| answers | {' | '.join(f'{rows} rows side by side' for rows in seconds)} |",
        "|---|" + "---:|" * len(seconds),
    ]
    for case, (_, _, other) in CASES.items():
        cells = []
        for taken in seconds.values():
            ratios = [theirs / ours for ours, theirs in zip(taken[case], taken[other], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
