"""Measuring a model on a column of text: its perplexity, and its distance from a reference, also layer by layer."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from batchinfer.engine.config import EngineConfig
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.fingerprints import model_digest
from batchinfer.jobs.plan.quality_file import Quality, write_quality
from batchinfer.jobs.tables.table import Table
from batchinfer.models.gguf_folder import weight_files
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from batchinfer.models.config import ModelConfig

CONTEXT = 512
"""Default number of tokens of a window."""


@dataclass(frozen=True)
class LayerError:
    """The errors of a layer through quantization, as relative errors: 0.01 is 1 %."""

    layer: int  # from 0
    own: float  # error of what the layer adds to the residual stream, given the reference's input
    stream: float  # error of the residual stream after the layer, when the model runs on its own


@dataclass(frozen=True)
class Evaluation:
    """The figures of a measurement.

    Each row is tokenized like a prompt, and cut into windows of `context` tokens without overlap. A window's first
    token is not predicted, and windows of one token are left out.
    """

    model: str
    reference: str | None
    quantization: str
    kv_cache_dtype: str
    scheme: str  # the quantization, and how the checkpoint is stored
    data: str
    column: str
    context: int
    rows: int
    windows: int
    tokens: int
    perplexity: float
    bits_per_byte: float
    divergence: float | None  # mean Kullback-Leibler divergence from the reference, in nats a token
    top1_agreement: float | None  # share of tokens for which both models' likeliest next token is the same
    layers: list[LayerError] | None
    seconds: float
    notes: list[str]

    @property
    def worst_layer(self) -> LayerError | None:
        """The layer that adds the largest error."""
        return max(self.layers, key=lambda layer: layer.own) if self.layers else None

    def table(self) -> str:
        """Return the figures as aligned lines."""
        amount = f"{count_of(self.rows, 'row')}, {count_of(self.tokens, 'token')} predicted"
        lines = {
            "model": self.model,
            "quantization": self.scheme,
            "data": f"{self.data}, column {self.column}: {amount}",
            "protocol": f"{count_of(self.windows, 'window')} of {self.context} tokens without overlap",
            "perplexity": f"{self.perplexity:.4f} a token",
            "bits per byte": f"{self.bits_per_byte:.4f}",
        }
        if self.divergence is not None and self.top1_agreement is not None:
            lines["reference"] = str(self.reference)
            lines["KL divergence"] = f"{self.divergence:.6f} nats a token"
            lines["top-1 agreement"] = f"{100 * self.top1_agreement:.2f} %"
        if self.layers is not None and self.worst_layer is not None:
            lines["errors by layer"] = "of what the layer adds     of the stream after it"
            for layer in self.layers:
                lines[f"  layer {layer.layer}"] = f"{100 * layer.own:20.3f} % {100 * layer.stream:24.3f} %"
            lines["largest error"] = f"layer {self.worst_layer.layer}"
        lines["time"] = f"{self.seconds:.1f} s"
        shown = [f"{name:<17}{value}" for name, value in lines.items()]
        return "\n".join(shown + [f"{'note':<17}{note}" for note in self.notes])


def evaluate(
    model: str,
    reference: str | None,
    data: Path,
    column: str,
    quantization: str,
    kv_cache_dtype: str,
    asked: int | None,
    rows: int | None,
) -> Evaluation:
    """Measure `model`, and its distance from `reference`, in windows of `asked` tokens.

    For None, windows have 512 tokens, or the model's context if that is shorter. The distance is kept for
    `batchinfer plan`. Raises `UsageError` and `Refused`.
    """
    if rows is not None and rows < 1:
        raise UsageError(f"--rows is {rows}; it must be 1 or more")
    table = Table.open([data])
    table.check([column])
    folder = resolve_model(model, None)
    reference_folder = None if reference is None else resolve_model(reference, None)
    from batchinfer.engine.own_engine import own_engine
    from batchinfer.quality.evaluator import Evaluator

    started = time.monotonic()
    context = _context(folder, asked)
    try:
        tokenizer = Tokenizer.load(folder)
        config = config_for_windows(folder, quantization, kv_cache_dtype, context)
        evaluated = own_engine(config, tokenizer)
        other = None
        if reference_folder is not None:
            other = own_engine(config_for_windows(reference_folder, "auto", "auto", context), tokenizer)
        evaluator = Evaluator(evaluated, other)
    except ValueError as error:
        raise Refused(str(error)) from error
    count = min(table.num_rows, rows or table.num_rows)
    left_out: list[int] = []
    windows = windows_of(table, column, tokenizer, context, count, left_out)
    scores = evaluator.scores(tqdm(windows, unit=" windows", disable=None, file=sys.stderr))
    if not scores.tokens:
        raise Refused(
            f"{data}: column {column!r} has no text of two tokens or more in {count} rows; give another column or table"
        )
    layers = None if evaluator.layers is None else enumerate(evaluator.layers.figures())
    notes = evaluated.stats().notes + evaluator.notes + _left_out(left_out)
    if reference is not None:
        found = Quality(
            scores.divergence / scores.tokens, scores.agreed / scores.tokens, scores.tokens, reference, "evaluate"
        )
        notes += write_quality(model_digest(folder), config, found)
    return Evaluation(
        model=model,
        reference=reference,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        scheme=_scheme(quantization, evaluated.runner.decoder.config, folder),
        data=str(data),
        column=column,
        context=context,
        rows=count,
        windows=scores.windows,
        tokens=scores.tokens,
        perplexity=scores.perplexity,
        bits_per_byte=scores.bits_per_byte,
        divergence=None if other is None else scores.divergence / scores.tokens,
        top1_agreement=None if other is None else scores.agreed / scores.tokens,
        layers=None if layers is None else [LayerError(i, own, stream) for i, (own, stream) in layers],
        seconds=time.monotonic() - started,
        notes=notes,
    )


def _scheme(quantization: str, config: "ModelConfig", folder: Path) -> str:
    stored = "GGUF" if weight_files(folder) else config.dtype if config.form is None else config.form.name
    return stored if quantization == "auto" else f"{quantization} from {stored}"


def _context(model: Path, asked: int | None) -> int:
    from batchinfer.models.config import read_model_config

    try:
        # The engine reserves room for one more token after a window.
        longest = read_model_config(model).max_positions - 1
    except ValueError as error:
        raise Refused(str(error)) from error
    context = min(CONTEXT, longest) if asked is None else asked
    if not 2 <= context <= longest:
        raise UsageError(f"--context is {context}; it must be from 2 to {longest} for this model")
    return context


def config_for_windows(model: Path, quantization: str, kv_cache_dtype: str, context: int) -> EngineConfig:
    """Return the config of an engine that computes a window of `context` tokens in one step."""
    return EngineConfig(
        model,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=context + 1,
        max_num_seqs=1,
        max_num_batched_tokens=max(context, 64),
        kv_cache_tokens=context + 1,
        expected_batch=context,
    )


def windows_of(
    table: Table, column: str, tokenizer: Tokenizer, context: int, rows: int, left_out: list[int]
) -> Iterator[NDArray[np.int32]]:
    """Yield windows of two tokens or more. Adds the ordinals of rows without a window to `left_out`."""
    for first, batch in table.batches([column], 256):
        values: list[Any] = batch.column(column).slice(0, max(0, rows - first)).to_pylist()
        ids, offsets = tokenizer.encode_batch([value if isinstance(value, str) else "" for value in values])
        for row, (start, stop) in enumerate(pairwise(offsets.tolist()), first):
            cuts = [*range(start, stop, context), stop]
            whole = [(a, b) for a, b in pairwise(cuts) if b - a > 1]
            if not whole:
                left_out.append(row)
            yield from (ids[a:b] for a, b in whole)
        if first + batch.num_rows >= rows:
            return


def _left_out(rows: list[int]) -> list[str]:
    if not rows:
        return []
    return [f"left out: {count_of(len(rows), 'row')} with less than two tokens of text, first row {rows[0]}"]
