"""How fast a CPU computes a mixture of experts: one layer of the shape of Qwen3-30B-A3B, with random weights.

    python benchmarks/experts.py [--kinds int8,bf16,w4] [--rows 1,4,...] [--turns N] [--profile] [--write]
    python benchmarks/experts.py --beside OTHER/.venv/bin/python [--runs N]

One layer has 128 experts of 768 and hidden size 2,048; 8 of them are chosen for a token. For steps of 1 to 1,024 tokens
it takes in turns: the whole block from router to sum; the products of the experts that it touches, alone, with the same
rows; a dense product of as many operations; and a copy in memory. Each turn has other tokens, and so touches other
experts. Times are processor time on one core, so that what else the machine does counts little; it may still take the
cache and the memory. `--profile` prints what torch's operations take. `--beside` runs this file in turns with the
Python of another checkout's environment and prints ratios. `--write` puts the page into benchmarks/results.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import conditions

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.host import allocator
from batchinfer.host.own_process import own_process
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.experts import route
from batchinfer.kernels.grain import padded_size
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.rows import Rows
from batchinfer.models.config import read_model_config
from batchinfer.models.feed_forward_weights import ExpertsWeights

RESULT = Path(__file__).parent / "results" / "experts.md"
ROWS, TURNS, COPIED = (1, 4, 16, 64, 256, 1024), 15, 1 << 27
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 1024,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
FOUR_BITS = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
                "dynamic": False,
            },
        }
    },
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "w8a8-int8"},
    "bf16": {"quantization": "none"},
    "w4": {"expected_batch": 1},  # few rows side by side: the weights stay in 4 bits
}
COLUMNS = (
    "tokens", "experts touched", "block, ms", "products alone, ms", "beside the products", "weights read, MB",
    "share of the copy rate", "share of a dense product",
)  # fmt: skip


class Mixture:
    """The block of one kind of weights, and what it is compared with."""

    def __init__(self, kind: str) -> None:
        with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
            shape = SHAPE | ({"quantization_config": FOUR_BITS} if kind == "w4" else {})
            (Path(name) / "config.json").write_text(json.dumps(shape))
            config = EngineConfig(Path(name), random_weights=True, **KINDS[kind])
            runner = ModelRunner(config, read_model_config(Path(name)))
        found = runner.decoder.layers[0].feed_forward
        assert isinstance(found, ExpertsWeights)
        self.block, self.do = found, runner.backend
        self.dense = Linear(torch.randn(1536, 2048).bfloat16()) if kind == "w4" else found.experts[0].gate_up
        self.an_expert = sum(product.nbytes for product in found.experts[0].products)

    def inputs(self, tokens: int) -> torch.Tensor:
        """Make the rows of a step, with padding."""
        return torch.randn(padded_size(tokens, 8), SHAPE["hidden_size"]).to(self.block.takes)

    def counts(self, x: torch.Tensor, tokens: int) -> list[tuple[int, int]]:
        """Return (expert, number of its tokens) of each expert that is touched."""
        logits = self.block.router(Rows(x.float())).dense()[:tokens]
        experts, _ = route(logits, SHAPE["num_experts_per_tok"], "softmax", True, 1.0)
        found = torch.bincount(experts.flatten(), minlength=SHAPE["num_experts"]).tolist()
        return [(expert, count) for expert, count in enumerate(found) if count]

    def products(self, counts: list[tuple[int, int]]) -> Callable[[], object]:
        """Make the experts' products of these many tokens, with nothing around them."""
        from batchinfer.kernels.grain import expert_size  # which an older checkout may lack

        work = []
        for expert, count in counts:
            of = self.block.experts[expert]
            rows = expert_size(count, of.gate_up.row_grain, of.gate_up.least_rows)
            for product, columns in ((of.gate_up, SHAPE["hidden_size"]), (of.down, SHAPE["moe_intermediate_size"])):
                work.append((product, rows_of(self.do, rows, columns, product.takes)))
        return lambda: [product(x) for product, x in work]

    def dense_product(self, tokens: int) -> Callable[[], object]:
        """Make a dense product of as many operations as those of so many tokens."""
        operations = tokens * SHAPE["num_experts_per_tok"] * self.block.experts[0].operations_per_row
        rows = -(-operations // self.dense.operations_per_row // 8) * 8
        x = rows_of(self.do, rows, SHAPE["hidden_size"], self.dense.takes)
        return lambda: self.dense(x)


def rows_of(do: Backend, rows: int, columns: int, takes: torch.dtype) -> Rows:
    """Make random rows for a product."""
    x = torch.randn(rows, columns)
    return do.rows(x, takes) if takes == torch.uint8 else Rows(x.to(takes))


def milliseconds(call: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    started = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started) / 1e6


def blocks(kind: str, rows: list[int], turns: int) -> dict[int, list[float]]:
    """Return for each number of tokens the milliseconds of the block in each turn."""
    mixture, found = Mixture(kind), dict[int, list[float]]()
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    allocator.keep_freed_memory()
    with torch.inference_mode():
        for tokens in rows:
            taken = []
            for _ in range(turns + 2):
                x = mixture.inputs(tokens)
                target.copy_(source)  # so that no weights are in the cache
                taken.append(milliseconds(lambda x=x, tokens=tokens: mixture.block(mixture.do, Rows(x), tokens)))
            found[tokens] = taken[2:]
    return found


def measure(kind: str, rows: list[int], turns: int, profile: bool) -> dict[int, list[dict[str, float]]]:
    """Return for each number of tokens the figures of each turn."""
    mixture, figures = Mixture(kind), dict[int, list[dict[str, float]]]()
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    allocator.keep_freed_memory()
    with torch.inference_mode():
        for tokens in rows:
            for turn in range(turns + 2):
                x = mixture.inputs(tokens)
                counts = mixture.counts(x, tokens)
                calls = {
                    "block": lambda x=x, tokens=tokens: mixture.block(mixture.do, Rows(x), tokens),
                    "products": mixture.products(counts),
                    "dense": mixture.dense_product(tokens),
                    "copy": lambda: target.copy_(source),
                }
                if turn < 2:  # oneDNN makes its kernels
                    for call in calls.values():
                        call()
                    continue
                taken = {name: milliseconds(call) for name, call in calls.items()}
                figures.setdefault(tokens, []).append(
                    {
                        "touched": len(counts), **taken, "bytes": len(counts) * mixture.an_expert,
                        "beside": 1 - taken["products"] / taken["block"],
                        "copy_share": len(counts) * mixture.an_expert / taken["block"] * taken["copy"] / (2 * COPIED),
                        "dense_share": taken["dense"] / taken["block"],
                    }
                )  # fmt: skip
            if profile:
                with torch.profiler.profile() as profiled:
                    mixture.block(mixture.do, Rows(mixture.inputs(tokens)), tokens)
                print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
            print(f"{kind}, {tokens} tokens: {cells(tokens, figures[tokens])}", file=sys.stderr, flush=True)
    return figures


def cells(tokens: int, turns: list[dict[str, float]]) -> str:
    """Return a row of the table: medians; of times and shares, the least and the most too."""
    middle = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}

    def spread(name: str, factor: float, form: str) -> str:
        least, most = min(turn[name] for turn in turns), max(turn[name] for turn in turns)
        return f"{middle[name] * factor:{form}} ({least * factor:{form}} to {most * factor:{form}})"

    shares = [f"{spread(name, 100, '.0f')} %" for name in ("beside", "copy_share", "dense_share")]
    beside, copied, dense = shares
    return " | ".join(
        (
            f"{tokens:,}", f"{middle['touched']:.0f}", spread("block", 1, ".2f"), spread("products", 1, ".2f"), beside,
            f"{middle['bytes'] / 1e6:,.0f}", copied, dense,
        )
    )  # fmt: skip


def page(found: dict[str, dict[int, list[dict[str, float]]]], turns: int, ran: dict[str, str]) -> str:
    """Return the results, to be read."""
    lines = [
        "# A mixture of experts on a CPU",
        "",
        "Printed by `python benchmarks/experts.py`: one layer of the shape of Qwen3-30B-A3B (hidden 2,048; 128 experts "
        f"of 768, 8 a token), random weights, processor time on one core; medians of {turns} turns (least to most). "
        "The machine also did other work. The copy rate counts bytes read and written; few tokens are bound by it, "
        "many by the speed of a dense product of the same operations (for w4, of one in bfloat16). "
        f"{', '.join(ran.values())}.",
    ]
    for kind, figures in found.items():
        lines += ["", f"## {kind}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---:|" * len(COLUMNS)]
        lines += [f"| {cells(tokens, of)} |" for tokens, of in figures.items()]
    return "\n".join(lines) + "\n"


def beside(other: str, args: argparse.Namespace) -> None:
    """Run both in turns and print what the block took."""
    options = ["--rows", args.rows, "--kinds", args.kinds, "--turns", str(args.turns), "--json"]
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(args.runs):
        runs = []
        for python in (sys.executable, other):
            done = subprocess.run([python, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout))
        for kind, figures in runs[0].items():
            for tokens in figures:
                pair = [statistics.median(run[kind][tokens]) for run in runs]
                ratios.setdefault((kind, tokens), []).append((pair[0], pair[1]))
    print("| weights | tokens | this, ms | other, ms | ratio (least to most) |\n|---|---:|---:|---:|---:|")
    for (kind, tokens), pairs in ratios.items():
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        found = sorted(a / b for a, b in pairs)
        spread = f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
        print(f"| {kind} | {tokens} | {ours:.2f} | {theirs:.2f} | {spread} |")


def main() -> None:
    """Measure, alone or beside another checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--beside", metavar="PYTHON")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.beside:
        return beside(args.beside, args)
    ran = conditions()
    own_process()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [int(count) for count in args.rows.split(",")]
    kinds = args.kinds.split(",")
    if args.json:
        return print(json.dumps({kind: blocks(kind, rows, args.turns) for kind in kinds}))
    found = {kind: measure(kind, rows, args.turns, args.profile) for kind in kinds}
    made = page(found, args.turns, ran)
    print(made)
    if args.write:
        RESULT.write_text(made)


if __name__ == "__main__":
    main()
