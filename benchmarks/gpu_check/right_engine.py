"""The engine against transformers: logits, greedy tokens; against itself: with graphs and without, alone and not."""

import json
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check.engines import engine_of, release, requests_of, tokens_of
from gpu_check.session import ROOT, Session, name_of
from torch import Tensor

from batchinfer.engine.engine import Engine

TARGET = ROOT / "examples" / "stdlib" / "target"
WORSE = 1.5
"""How much larger than transformers' own our error in 16 bits may be."""
FLOAT32 = 1e-4
"""The relative error of logits in float32."""
GREEDY_FLOAT32 = 0.97
"""The share of rows whose tokens must be transformers' in float32: ties apart they all are."""


def run_logits(session: Session) -> None:
    """Relative errors of logits on a model with random weights, beside those of transformers in the same type."""
    lengths = session.pick((1, 31, 32, 33, 63, 64, 65, 128, 129, 400, 777), (1, 65))
    with tempfile.TemporaryDirectory() as name:
        folder, vocab = Path(name), session.pick(8192, 320)
        exact = oracle(session, write_model(session, folder), torch.float32)
        prompts = [np.random.default_rng(n).integers(2, vocab, n).tolist() for n in lengths]
        theirs = oracle(session, folder, torch.bfloat16)
        session.say("transformers is there")
        for dtype in session.within_time(dict.fromkeys((session.dtype, torch.float32))):
            with session.case(f"logits in {name_of(dtype)}"):
                engine = engine_on(session, folder, dtype)
                pairs = list(logits_of(session, engine, prompts))
                known, ours = [tokens for tokens, _ in pairs], torch.stack([logits for _, logits in pairs])
                expected = torch.stack([last_logits(exact, tokens) for tokens in known])
                in_16_bits = torch.stack([last_logits(theirs, tokens) for tokens in known])
                error, other = relative_error(ours, expected), relative_error(in_16_bits, expected)
                session.row(
                    "Logits against transformers in float32",
                    type=name_of(dtype),
                    positions=len(known),
                    **{"our error": error, "transformers' in bf16": other, "ratio": error / other},
                )
                bound = FLOAT32 if dtype == torch.float32 else WORSE * other
                assert error <= bound, f"relative error {error:.2e} instead of at most {bound:.2e}"
                if dtype != torch.float32:
                    aim = f"the error of logits in {name_of(dtype)} at most {WORSE} times transformers'"
                    session.findings.aim(aim, f"{error / other:.2f} times", error <= bound)
            release(session)


def run_greedy(session: Session) -> None:
    """The trained model of the examples: greedy tokens beside those of transformers in float32."""
    from batchinfer.text.tokenizer import Tokenizer

    rows, new = session.pick((48, 48), (2, 2))
    text = (ROOT / "batchinfer" / "text" / "tokenizer.py").read_text()  # of the kind that it was trained on
    cuts = np.linspace(200, len(text) - 100, rows).astype(int).tolist()
    texts = [text[max(0, cut - 60 - 17 * i) : cut] for i, cut in enumerate(cuts)]
    flat, offsets = Tokenizer.load(TARGET).encode_batch(texts)
    prompts = [flat[a:b].tolist() for a, b in pairwise(offsets)]
    exact = oracle(session, TARGET, torch.float32)
    greedy = [_greedy(exact, prompt, new) for prompt in prompts]
    session.say("transformers in float32")
    if not session.smoke:
        theirs = oracle(session, TARGET, torch.bfloat16)
        _agreement(session, "transformers bf16", [_greedy(theirs, prompt, new) for prompt in prompts], greedy)
    for dtype in session.within_time(dict.fromkeys((session.dtype, torch.float32))):
        with session.case(f"greedy tokens in {name_of(dtype)}"):
            found = tokens_of(engine_on(session, TARGET, dtype), requests_of(prompts, new))
            share = _agreement(
                session, f"batchinfer {name_of(dtype)}", [found[row] for row in range(len(prompts))], greedy
            )
            assert dtype != torch.float32 or share >= GREEDY_FLOAT32, f"{share:.0%} of the rows agree"
        session.say(f"greedy in {name_of(dtype)}")


def _agreement(session: Session, engine: str, found: list[list[int]], expected: list[list[int]]) -> float:
    equal = [one == other for one, other in zip(found, expected, strict=True)]
    first = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(found, expected, strict=True)
    ]
    session.row(
        "Greedy tokens of the trained model against transformers in float32",
        engine=engine,
        rows=len(equal),
        tokens=len(expected[0]),
        **{
            "rows all equal, share": sum(equal) / len(equal),
            "tokens before the first other, mean": float(np.mean(first)),
        },
    )
    return sum(equal) / len(equal)


def run_graphs(session: Session) -> None:
    """Steps recorded and replayed give the tokens of steps that are not."""
    with tempfile.TemporaryDirectory() as name:
        model = write_model(session, Path(name))
        rows, new = session.pick((16, 40), (3, 6))
        vocab = session.pick(8192, 320)
        rng = np.random.default_rng(3)
        same = [rng.integers(2, vocab, 20).tolist() for _ in range(rows)]
        mixed = [rng.integers(2, vocab, int(n)).tolist() for n in rng.integers(1, session.pick(300, 40), rows - 1)]
        # As many rows as a recorded step has: products see the same number of rows both ways. With others beside them
        # bits are the same only where the engine is deterministic.
        for case, prompts, settings in session.within_time(
            (
                ("rows that fill a recorded size", same, {}),
                ("any number of rows, deterministic", mixed, {"deterministic": True}),
            )
        ):
            for temperature in session.within_time(session.pick((0.0, 0.8), (0.8,))):
                with session.case(f"graphs, {case}, temperature {temperature}"):
                    requests = requests_of(prompts, new, temperature=temperature)
                    engine = engine_on(session, model, session.dtype, **settings)
                    replayed, replays = tokens_of(engine, requests), engine.runner.steps.replays
                    shapes = len(engine.runner.steps.recordings)
                    engine = engine_on(session, model, session.dtype, **settings)
                    engine.runner.steps.recording = False
                    eager, none = tokens_of(engine, requests), engine.runner.steps.replays
                    session.row(
                        "Tokens with steps replayed, and without",
                        case=case,
                        temperature=temperature,
                        rows=len(prompts),
                        replays=replays,
                        recordings=shapes,
                        **{"rows equal": sum(replayed[row] == eager[row] for row in eager)},
                    )
                    assert replays > 0 and none == 0, f"{replays} steps replayed, {none} where none should be"
                    assert replayed == eager, "tokens differ"
                release(session)
        session.say("graphs")


def run_alone(session: Session) -> None:
    """A deterministic engine's rows, one at a time and all together."""
    with tempfile.TemporaryDirectory() as name:
        model = write_model(session, Path(name))
        rng = np.random.default_rng(4)
        rows, new = session.pick((24, 32), (2, 3))
        prompts = [rng.integers(2, 300, int(n)).tolist() for n in rng.integers(1, session.pick(400, 40), rows)]
        kinds = {"bf16": {}, "w8a8-fp8": {"quantization": "w8a8-fp8"}, "kv int8": {"kv_cache_dtype": "int8"}}
        for kind, settings in session.within_time(session.pick(kinds, {"fp32": {}}).items()):
            for temperature in session.within_time(session.pick((0.0, 0.8), (0.8,))):
                with session.case(f"alone and together, {kind}, temperature {temperature}"):
                    requests = requests_of(prompts, new, temperature=temperature)
                    settings = {"deterministic": True, **settings}
                    together = tokens_of(engine_on(session, model, session.dtype, **settings), requests)
                    alone = tokens_of(engine_on(session, model, session.dtype, max_num_seqs=1, **settings), requests)
                    equal = sum(together[row] == alone[row] for row in together)
                    session.row(
                        "Deterministic rows alone and together",
                        kind=kind,
                        temperature=temperature,
                        rows=rows,
                        tokens=new,
                        **{"rows equal": equal},
                    )
                    assert equal == rows, f"{rows - equal} of {rows} rows differ"
                release(session)
            session.say(f"alone, {kind}")


def write_model(session: Session, folder: Path) -> Path:
    """A model of noise that keeps activations at their size, saved by transformers."""
    import transformers

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 8192}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    if session.smoke:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = transformers.AutoConfig.for_model("llama", **sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def engine_on(session: Session, model: Path, dtype: torch.dtype, **settings: Any) -> Engine:
    longest = min(1024, json.loads((model / "config.json").read_text())["max_position_embeddings"])
    base = {"max_model_len": longest, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_tokens": 32768}
    if session.smoke:
        base = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_tokens": 1024}
    return engine_of(session, model, dtype=str(dtype).removeprefix("torch."), quantization=settings.pop(
        "quantization", "none"), **{**base, **settings})  # fmt: skip


def logits_of(session: Session, engine: Engine, prompts: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """(all tokens before it, our logits [V]) of the first and the second new token of each prompt."""
    engine.add(requests_of(prompts, 2))
    while (batch := engine.scheduler.schedule()) is not None:
        logits = engine.runner.logits(batch)[: len(batch.sequences)]
        for place, ours in zip(batch.sequences.tolist(), logits, strict=True):
            yield engine.table.tokens[place, : engine.table.length[place]].tolist(), ours
        engine.scheduler.update(batch, logits.argmax(-1).cpu().numpy())
        for place in batch.sequences.tolist():
            if engine.table.length[place] == engine.table.end[place]:
                engine.scheduler.finish(place)


def oracle(session: Session, model: Path, dtype: torch.dtype) -> Any:
    import transformers

    torch.set_float32_matmul_precision("highest")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(session.device)


@torch.no_grad()
def last_logits(model: Any, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens], device=model.device)).logits[0, -1].float()


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """So many tokens, whatever they are."""
    ids, past, found = torch.tensor([prompt], device=model.device), None, []
    for _ in range(new):
        out = model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
