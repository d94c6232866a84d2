"""`StepBuffer`: where each array of a recorded step lies in one buffer, which is the same for all steps of a shape.

A step is written to the host's buffer with its padding. Padding tokens sample nothing that anybody reads: they write
their keys and values to slot 0 of block 0, which belongs to no sequence, and attend to that one.
"""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from batchinfer.engine.step_shape import StepShape, plans_of
from batchinfer.engine.transfer import ALIGNMENT, view
from batchinfer.kernels.attention_plan import ITEM, AttentionPlan, Column
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.models.batch import Batch, Queries

NOWHERE = -1  # a place that nobody reads
SAMPLING = tuple(field.name for field in fields(SamplingBatch))
REALS = ("temperature", "top_p", "min_p")
NONE = np.empty(0, np.int64)

Name = str | tuple[str, str] | tuple[str, int] | tuple[str, int, int]


class StepBuffer:
    """The layout of a shape's steps: `batch()` is its tensors in a buffer, `write()` puts a step's numbers there."""

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self.nbytes = 0
        self._arrays: dict[Name, tuple[int, tuple[int, ...], np.dtype[np.generic]]] = {}
        n = shape.tokens
        for name in ("tokens", "positions", "slots", "sampled", "places", "late_rows", "late_places"):
            self._add(name, np.int64, n)
        for name in SAMPLING if shape.sampling else ():
            self._add(("sampling", name), np.float32 if name in REALS else np.int64, n)
        self._add("table", np.int32, n, shape.columns)
        for i, plan in enumerate(shape.plans):
            self._add(("first", i), np.int32, n + 1)
            self._add(("merged", i), np.int32, plan.merged)
            for j, (_, items) in enumerate(plan.launches):
                self._add(("items", i, j), np.int32, items, ITEM)

    def _add(self, name: Name, dtype: DTypeLike, *shape: int) -> None:
        kind = np.dtype(dtype)
        self._arrays[name] = (self.nbytes, shape, kind)
        self.nbytes += -(-math.prod(shape) * kind.itemsize // ALIGNMENT) * ALIGNMENT

    def batch(self, buffer: Tensor) -> Batch:
        """Return a step whose tensors are views of `buffer` (uint8); it has no sequences: they differ by step."""
        at = {
            name: view(buffer, offset, shape, torch.from_numpy(np.empty(0, dtype)).dtype)
            for name, (offset, shape, dtype) in self._arrays.items()
        }
        attention: dict[AttentionShape, AttentionBatch] = {}
        for i, plan in enumerate(self.shape.plans):
            launches = tuple((tile, at["items", i, j]) for j, (tile, _) in enumerate(plan.launches))
            attention[plan.attention] = AttentionPlan(
                plan.attention.window,
                at["table"],
                launches,
                at["first", i],
                at["merged", i],
                plan.partials,
                keys_read=0,
                keys_unshared=0,
                spare=0,
            )
        nothing = torch.empty(0, dtype=torch.int64, device=buffer.device)
        return Batch(
            tokens=at["tokens"],
            positions=at["positions"],
            slots=at["slots"],
            attention=attention,
            sampled=at["sampled"],
            sampling=SamplingBatch(**{name: at["sampling", name] for name in SAMPLING})
            if self.shape.sampling
            else None,
            places=at["places"],
            copied=nothing,
            copies=nothing,
            late_rows=at["late_rows"],
            late_places=at["late_places"],
            chunks=(),
            queries=Queries(NONE, NONE, NONE, NONE),
            sequences=NONE,
            epochs=NONE,
            prompt_tokens=0,
        )

    def write_padding(self, host: NDArray[np.uint8]) -> None:
        """Write a step of padding alone to the first `nbytes` of `host`."""
        at = self._blank(host)
        for i in range(len(self.shape.plans)):
            self._write_idle(at["items", i, 0], 0, 0)

    def write(self, batch: Batch, host: NDArray[np.uint8]) -> None:
        """Write a step of this shape, and its padding, to the first `nbytes` of `host`."""
        at = self._blank(host)
        tokens, rows = batch.query_tokens, len(batch.places)
        for name in ("tokens", "positions", "slots"):
            at[name][:tokens] = getattr(batch, name).numpy()[:tokens]
        for name in ("sampled", "places"):
            at[name][:rows] = getattr(batch, name).numpy()[:rows]
        at["late_places"][batch.late_rows.numpy()] = batch.late_places.numpy()
        if batch.sampling is not None:
            for name in SAMPLING:
                at["sampling", name][:rows] = getattr(batch.sampling, name).numpy()
        for i, plan in enumerate(plans_of(batch)):
            self._write_plan(at, i, plan)

    def _blank(self, host: NDArray[np.uint8]) -> dict[Name, NDArray[Any]]:
        """Return the arrays in `host`, all zeros but for the places."""
        host[: self.nbytes] = 0
        at = {name: np.ndarray(shape, dtype, host, offset) for name, (offset, shape, dtype) in self._arrays.items()}
        at["places"][:] = at["late_places"][:] = NOWHERE
        at["late_rows"][:] = np.arange(self.shape.tokens)
        return at

    def _write_plan(self, at: dict[Name, NDArray[Any]], i: int, plan: AttentionPlan) -> None:
        table, first, merged = plan.table.numpy(), plan.first.numpy(), plan.merged.numpy()
        rows, columns = table.shape
        if i == 0:  # all plans share it
            at["table"][:rows, :columns] = table
        at["first", i][: len(first)] = first
        at["first", i][len(first) :] = first[-1]
        # Merging leaves a token without partials alone, and the one with the fewest has none where `merged` has room.
        at["merged", i][len(merged) :] = np.argmin(np.diff(at["first", i]))
        at["merged", i][: len(merged)] = merged
        for j, (_, items) in enumerate(plan.launches):
            into = at["items", i, j][: len(items)]
            into[:] = items.numpy()
            into[:, Column.BLOCKS] = into[:, Column.BLOCKS] // columns * self.shape.columns
        self._write_idle(at["items", i, 0], len(plan.launches[0][1]), plan.tokens)

    def _write_idle(self, items: NDArray[Any], begin: int, tokens: int) -> None:
        """Write items for the padding tokens, those after `tokens`; each sees the one key in slot 0."""
        rows = np.arange(tokens, self.shape.tokens)
        idle = items[begin : begin + len(rows)]
        idle[:, Column.ROW] = rows
        idle[:, Column.BLOCKS] = rows * self.shape.columns  # no sequence has these rows of the table: they are zeros
        idle[:, [Column.COUNT, Column.END]] = 1
        idle[:, Column.PARTIAL] = -1
