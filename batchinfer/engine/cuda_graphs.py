"""`CudaGraphs`: records decoding steps on a GPU as CUDA graphs and replays them.

Launching a kernel takes the host about ten microseconds, and a step has hundreds of kernels: with few rows this takes
longer than the GPU computes. Replaying a graph launches all of them at once. A graph needs the same shapes and
addresses at each replay. So decoding steps are padded to a few sizes, and their tensors are copied to a fixed buffer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.engine.transfer import Transfer, tensors_of
from batchinfer.kernels.attention_plan import ITEM, AttentionPlan, Column
from batchinfer.models.batch import Batch

Compute = Callable[[Batch], tuple[Tensor, Tensor]]
"""Computes a batch whose tensors are on the device; returns (token ids [r] int64, finite [r] bool) there."""

RECORD_AFTER = 8
"""A shape is recorded when this many steps had it: a rare shape never repays the recording, which runs the step's code
twice, with the driver's own work on top. The number is unmeasured."""
MOST_SEQUENCES = 512
"""Steps with more sequences are not recorded, because they compute for longer than launching takes. Unmeasured."""


@dataclass(frozen=True)
class Recording:
    """The recording of a step of one shape: its input buffer, how to replay it, and its result tensors."""

    buffer: Tensor  # [bytes] uint8, holds all tensors of the step's batch
    replay: Callable[[], None]
    tokens: Tensor
    finite: Tensor


class CudaGraphs:
    """Runs steps on the device; a step whose shape has a recording is replayed."""

    def __init__(self, compute: Compute, device: torch.device, notes: list[str]) -> None:
        """Prepare to run steps with `compute`; `notes` gets a line for the report if a step cannot be recorded."""
        self.compute, self.device, self.notes = compute, device, notes
        self.recording = True
        self.transfer = Transfer(device)
        self.met: Counter[tuple[object, ...]] = Counter()
        self.recordings: dict[tuple[object, ...], Recording] = {}
        self.replays = 0
        if device.type == "cuda":  # graphs share one memory pool, because no two run at the same time
            self.graph_memory = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Start a step; return (token ids [r], finite [r]), tensors on the device that the step fills later."""
        rows = len(batch.sequences)
        # How many logits change differs from step to step, so that such steps never have the same shape twice.
        unique = batch.prompt_tokens or batch.query_tokens > rows or batch.changes is not None
        if unique or rows > MOST_SEQUENCES or not self.recording:
            return self.compute(self.transfer.send(batch))
        padded = padded_step(batch)
        shape = shape_of(padded)
        self.met[shape] += 1
        if (recording := self.recordings.get(shape)) is not None:
            self.transfer.send(padded, recording.buffer)
            recording.replay()
            self.replays += 1
            return recording.tokens[:rows], recording.finite[:rows]
        if self.met[shape] < RECORD_AFTER:
            return self.compute(self.transfer.send(batch))
        tokens, finite = self._record(padded, shape)
        return tokens[:rows], finite[:rows]

    def _record(self, padded: Batch, shape: tuple[object, ...]) -> tuple[Tensor, Tensor]:
        """Compute a padded step, and record it for later steps of its shape."""
        buffer = torch.empty(sum(t.nbytes + 16 for t in tensors_of(padded)), dtype=torch.uint8, device=self.device)
        there = self.transfer.send(padded, buffer)
        computed = self.compute(there)  # before recording, because kernels are compiled at their first call
        if self.device.type == "cuda":
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.graph_memory):
                    tokens, finite = self.compute(there)
            except torch.OutOfMemoryError:
                self.recording = False
                self.recordings.clear()
                self.notes.append(
                    "the device's memory did not hold recorded steps: all were launched kernel by kernel from then on; "
                    "a lower --gpu-memory-utilization avoids it"
                )
            else:
                self.recordings[shape] = Recording(buffer, graph.replay, tokens, finite)
        else:  # on the CPU, for tests: the same code without a graph
            tokens, finite = (torch.empty_like(t) for t in computed)

            def replay() -> None:
                for into, new in zip((tokens, finite), self.compute(there), strict=True):
                    into.copy_(new)

            self.recordings[shape] = Recording(buffer, replay, tokens, finite)
        return computed


def padded_step(batch: Batch) -> Batch:
    """Pad a decoding step to `padded_count` sequences; the padding writes its keys and values to block 0."""
    rows = len(batch.sequences)
    size = padded_count(rows)
    more = size - rows
    sampling = batch.sampling
    if sampling is not None:
        columns = {name: _pad(getattr(sampling, name), more) for name in sampling.__dataclass_fields__}
        sampling = replace(sampling, **columns)
    return replace(
        batch,
        tokens=_pad(batch.tokens[:rows], more),
        positions=_pad(batch.positions[:rows], more),
        slots=_pad(batch.slots[:rows], more),
        sampled=torch.arange(size),
        places=F.pad(batch.places, (0, more), value=-1),
        late_rows=_pad_late(batch.late_rows, torch.arange(rows, size)),
        late_places=_pad_late(batch.late_places, torch.full((more,), -1)),
        sampling=sampling,
        attention={w: _padded_plan(plan, size) for w, plan in _plans(batch).items()},
    )


def padded_count(count: int) -> int:
    """Round `count` up to 1, 2, 4, 8, or beyond that to one of four sizes per power of two."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    grain = 1 << (count - 1).bit_length() - 3
    return -(-count // grain) * grain


def _padded_plan(plan: AttentionPlan, size: int) -> AttentionPlan:
    """Pad a plan to `size` tokens.

    A padding token attends to one arbitrary key, and padding items do nothing. The table, the items and the partial
    results are padded too, so that steps of similar size have the same shape.
    """
    table = plan.table
    blocks = table.shape[1]
    wider_blocks = 1 << (blocks - 1).bit_length()
    wider = F.pad(table, (0, wider_blocks - blocks, 0, size - len(table)))
    idle = torch.zeros(size - plan.tokens, ITEM, dtype=torch.int32)
    idle[:, Column.ROW] = torch.arange(plan.tokens, size)
    idle[:, Column.COUNT] = 1
    idle[:, Column.END] = 1
    idle[:, Column.PARTIAL] = -1
    launches = []
    for tile, items in plan.launches:
        moved = torch.cat([items, idle])
        moved[:, Column.BLOCKS] = moved[:, Column.BLOCKS] // blocks * wider_blocks
        launches.append((tile, F.pad(moved, (0, 0, 0, padded_count(len(moved)) - len(moved)))))
    merged = plan.merged
    if len(merged):
        # Padding repeats the first entry, which writes the same numbers again.
        merged = torch.cat([merged, merged[:1].expand(size - len(merged))])
    first = torch.cat([plan.first, plan.first[-1:].expand(size + 1 - len(plan.first))])
    partials = padded_count(plan.partials) if plan.partials else 0
    return replace(plan, table=wider, launches=tuple(launches), first=first, merged=merged, partials=partials)


def shape_of(batch: Batch) -> tuple[object, ...]:
    """Return all that two steps must have in common for one recording to serve both."""
    layout = tuple((tuple(t.shape), t.dtype) for t in tensors_of(batch))
    return (layout, tuple((plan.partials, *(tile for tile, _ in plan.launches)) for plan in _plans(batch).values()))


def _plans(batch: Batch) -> dict[int | None, AttentionPlan]:
    return {window: plan for window, plan in batch.attention.items() if isinstance(plan, AttentionPlan)}


def _pad_late(column: Tensor, more: Tensor) -> Tensor:
    """Append `more` to a column of late tokens, those that only the device knows; leave an empty column empty."""
    return torch.cat([column, more]) if len(column) else column


def _pad(column: Tensor, more: int) -> Tensor:
    return F.pad(column, (0, more))
