"""A deterministic engine's rows have the same bits whatever is computed beside them: products, attention, models."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check.compare import Errors
from gpu_check.engines import engine_of, release, requests_of, shape_of
from gpu_check.paged import Paged, paged
from gpu_check.session import SHAPES, Session, name_of
from torch import Tensor

TITLE = "Rows whose bits differ from those of the same row alone"
SEQUENCES = (2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 100, 127, 128, 129, 256, 511, 512)
NEW_TOKENS = range(1, 10)


def run_products(session: Session) -> None:
    """Every kind of product, with as many rows as sequences times query tokens make."""
    errors = Errors(session)
    for kind, (product, rows_of) in _products(session).items():
        with session.case(f"{kind}: a row in batches"):
            x = rows_of()
            whole = product(x)
            count = len(whole)
            sizes = {s * q for s in session.pick(SEQUENCES, (2, 5)) for q in session.pick(NEW_TOKENS, (1, 3))}
            for size in sorted(sizes | {1}):
                errors.same(f"product, {kind}", "all rows", product(_some(x, slice(size))), whole[:size])
            for row in range(0, count, max(count // 16, 1)):
                alone = product(_some(x, slice(row, row + 1)))
                errors.same(f"product, {kind}", "one row of many", alone, whole[row : row + 1])
            order = torch.randperm(count, generator=session.generator(9), device=session.device)
            errors.same(f"product, {kind}", "rows in another order", product(_some(x, order)), whole[order])
        session.say(kind)
    errors.write(TITLE)


def _some(x: Any, which: slice | Tensor) -> Any:
    from batchinfer.kernels.rows import Rows

    def part(values: Tensor) -> Tensor:
        if values.dtype == torch.float8_e4m3fn:  # which torch indexes by tensors only as bytes
            return values.view(torch.uint8)[which].contiguous().view(values.dtype)
        return values[which].contiguous()

    return Rows(part(x.values), None if x.scale is None else part(x.scale))


def _products(session: Session) -> dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]]:
    """By kind: the product of a deterministic engine, and what gives its rows."""
    from batchinfer.kernels.backend_triton import TritonBackend
    from batchinfer.kernels.rows import Rows

    n, k, group = session.pick((1536, 4096, 128), (24, 160, 32))
    count = session.pick(512 * 9, 15)
    do, on = TritonBackend(session.device, deterministic=True), session.device
    generator = session.generator()

    def floats(dtype: torch.dtype) -> Any:
        return Rows(torch.randn(count, k, generator=session.generator(1), device=on).to(dtype))

    def rows_of(dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: floats(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else quantized(dtype)

    def quantized(dtype: torch.dtype) -> Any:
        return do.rows(floats(session.dtype).values, dtype)

    kinds: dict[str, tuple[Any, Callable[[], Any]]] = {}
    for dtype in session.dtypes:
        kinds[name_of(dtype)] = (do.linear(torch.randn(n, k, generator=generator, device=on).to(dtype)), rows_of(dtype))
    scale = torch.rand(n, generator=generator, device=on)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        weight = (40 * torch.randn(n, k, generator=generator, device=on)).clamp_(-127, 127).to(dtype)
        kinds[name_of(dtype)] = (do.linear_w8a8(weight, scale, None, session.dtype), rows_of(dtype))
    four = torch.randint(-8, 8, (n, k), generator=generator, device=on, dtype=torch.int8)
    scales = torch.rand(n, k // group, generator=generator, device=on)
    zeros = torch.zeros(n, k // group, device=on)
    kinds["4 bits"] = (do.linear_w4a16(four, scales, zeros, None, session.dtype), rows_of(session.dtype))
    return {kind: (lambda x, product=product: product(x).values, rows) for kind, (product, rows) in kinds.items()}


def run_attention(session: Session) -> None:
    """Sequences in batches, tokens as drafts or on their own."""
    errors = Errors(session)
    rng = np.random.default_rng(0)
    for kv in (session.dtype, torch.int8, torch.float8_e4m3fn):
        for new in session.pick(NEW_TOKENS, (1, 3)):
            with session.case(f"attention in batches, {new} new tokens, cache in {name_of(kv)}"):
                count, longest = session.pick(512, 4), session.pick(700, 80)
                rows = [(int(c), new) for c in rng.integers(new, longest, count)]
                rows[1] = (session.pick(5000, 90), new)
                case = paged(session, rows, session.pick((8, 2, 128), (2, 1, 16)), session.dtype, kv)
                _attention_in_batches(session, errors, case, new, name_of(kv))
        session.say(f"cache in {name_of(kv)}")
    errors.write(TITLE)


def _attention_in_batches(session: Session, errors: Errors, case: Paged, new: int, kv: str) -> None:
    whole = _deterministic(session, case)
    for sequences in session.pick(SEQUENCES[::3], (2, 3)):
        found = _deterministic(session, case.part(sequences))
        errors.same(f"attention, cache {kv}", "in smaller batches", found, whole[: sequences * new])
    for s in session.pick((0, 1, 2, 100, 511), (1,)):
        for token in range(new):
            alone = _deterministic(session, case.alone(s, token))
            row = s * new + token
            errors.same(f"attention, cache {kv}", "as a draft, and alone", alone, whole[row : row + 1])


def _deterministic(session: Session, case: Paged) -> Tensor:
    from batchinfer.kernels.attention_plan import plan_attention
    from batchinfer.kernels.attention_triton import paged_attention, tiling

    heads, head_dim = case.query.shape[1:]
    kv_heads = case.cache.key.shape[1]
    tiles = tiling(head_dim, heads // kv_heads, case.query.dtype, case.cache.key.dtype, session.gpu)
    plan = plan_attention(case.batch, heads, kv_heads, None, tiles, None)
    return paged_attention(case.query, case.cache, plan, case.scale)


def run_model(session: Session) -> None:
    """Logits of a small model: rows in batches of several sizes, prompts in pieces, the last of 1 to 9 tokens."""
    errors = Errors(session)
    kinds = {"as it is": {}, "w8a8-int8": {"quantization": "w8a8-int8"}, "w8a8-fp8": {"quantization": "w8a8-fp8"}}
    kinds |= {"4 bits": {"shape": "llama-3-8b-w4a16"}, "kv fp8": {"kv_cache_dtype": "fp8"}}
    if session.smoke:
        kinds = {"as it is": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind, settings in kinds.items():
            with session.case(f"logits of a model, {kind}"):
                model = small_model(session, Path(folder), settings.pop("shape", "llama-3-8b"))
                _model(session, errors, kind, model, settings)
            release(session)
            session.say(kind)
    errors.write(TITLE)


def small_model(session: Session, folder: Path, shape: str) -> Path:
    """A shape of the engine's tests on the device, too: a few layers."""
    import json

    model = shape_of(session, SHAPES / shape, folder)
    if not session.smoke:
        small = folder / f"small-{shape}"
        small.mkdir(exist_ok=True)
        config = json.loads((model / "config.json").read_text())
        config |= {"num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 8192}
        config |= {"num_attention_heads": 8, "num_key_value_heads": 2}
        (small / "config.json").write_text(json.dumps(config))
        model = small
    return model


def _model(session: Session, errors: Errors, kind: str, model: Path, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    count = session.pick(512, 2)
    # Lengths of a tile and 1 to 9 tokens: in steps of one tile, those are the query tokens of the second one.
    lengths = [64 + 1 + i % 9 if i % 2 else int(rng.integers(1, session.pick(300, 70))) for i in range(count)]
    prompts = [rng.integers(2, 300, length).tolist() for length in lengths]
    together = _logits(session, model, prompts, count, session.pick(8192, 512), settings)
    ways = {"in batches of 64": (64, 2048), "in batches of 5, pieces of 64": (5, 64), "alone": (1, 512)}
    if session.smoke:
        ways = {"alone, pieces of 64": (1, 64)}
    for way, (most, budget) in ways.items():
        some = prompts if most > 5 else prompts[: session.pick(24, 2)]
        found = _logits(session, model, some, most, budget, settings)
        for row in range(len(some)):
            for place, (one, other) in enumerate(zip(found[row], together[row], strict=True)):
                errors.same(f"model, {kind}", f"{way}, new token {place + 1}", one, other)


def _logits(
    session: Session, model: Path, prompts: list[list[int]], most: int, budget: int, settings: dict[str, Any]
) -> dict[int, list[Tensor]]:
    """Of the first and the second new token of each prompt."""
    config = {"max_model_len": 512, "max_num_seqs": most, "max_num_batched_tokens": budget, **settings}
    blocks = 32 * sum(len(prompt) // 32 + 2 for prompt in prompts)
    engine = engine_of(
        session, model, dtype=str(session.dtype).removeprefix("torch."), kv_cache_tokens=blocks,
        random_weights=True, deterministic=True, **config,
    )  # fmt: skip
    engine.add(requests_of(prompts, 2))
    found: dict[int, list[Tensor]] = {row: [] for row in range(len(prompts))}
    while (batch := engine.scheduler.schedule()) is not None:
        logits = engine.runner.logits(batch)[: len(batch.sequences)].cpu()
        for row, values in zip(engine.table.row[batch.sequences].tolist(), logits, strict=True):
            found[row].append(values)
        engine.scheduler.update(batch, logits.argmax(-1).numpy())
        for place in batch.sequences.tolist():
            if engine.table.length[place] == engine.table.end[place]:
                engine.scheduler.finish(place)
    return found
