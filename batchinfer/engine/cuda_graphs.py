"""`CudaGraphs`: records decoding steps on a GPU as CUDA graphs and replays them.

Launching a kernel takes the host about ten microseconds, and a step has hundreds of kernels: with few rows this takes
longer than the GPU computes. Replaying a graph launches all of them at once. A graph needs the same shapes and
addresses at each replay. So decoding steps are padded to a few shapes, and each is written to its recording's buffer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import StepShape, doubled, largest_count, padded_count
from batchinfer.engine.transfer import Transfer
from batchinfer.kernels.scores import StepScores
from batchinfer.models.batch import Batch

Found = tuple[Tensor, Tensor, StepScores]
"""What a step finds, on the device: (token ids [r] int64, finite [r] bool, log-probabilities)."""
Compute = Callable[[Batch], Found]
"""Computes a batch whose tensors are on the device."""

MOST_TOKENS = 1024
"""Steps with more tokens are not recorded, because they compute for longer than launching takes. Unmeasured."""
MOST_RECORDINGS = 64
"""Recordings kept, those replayed last: a job that decodes 1,024 sequences, then fewer and fewer, has 33 sizes."""
OFTEN = 8
"""A size is recorded when it comes so many times: until then its steps are padded to the next power of two. Recording
takes as long as a few steps, and of many sizes only a few steps come. Unmeasured."""
RECORDING_BYTES = 2 << 20
"""What the driver keeps on the device for a recording of hundreds of kernels, and its results. Unmeasured."""


@dataclass(frozen=True)
class Recording:
    """The recording of a step of one shape: its inputs, how to replay it, and its result tensors."""

    inputs: StepBuffer
    buffer: Tensor  # [bytes] uint8, holds all tensors of the step's batch
    replay: Callable[[], None]
    tokens: Tensor
    finite: Tensor


def most_recorded(config: EngineConfig) -> int:
    """Return the most tokens of a recorded step, if memory holds it: a token for each row that runs, and its drafts."""
    speculation = config.speculation
    drafts = 0 if speculation.method == "off" else speculation.num_speculative_tokens
    rows = min(config.max_num_seqs, config.usual_batch)
    return padded_count(min(rows * (1 + drafts), config.max_num_batched_tokens, MOST_TOKENS))


class CudaGraphs:
    """Runs steps on the device; a step without prompt tokens is replayed, and a shape recorded when it is first needed.

    Recordings share their memory, because no two run at the same time: what a step computes lies in one pool, and its
    inputs in one buffer. Steps of more than `most_tokens` tokens, a `padded_count`, are not recorded.
    """

    def __init__(self, compute: Compute, device: torch.device, most_tokens: int, notes: list[str]) -> None:
        """Prepare to run steps with `compute`; `notes` gets a line for the report if a step cannot be recorded."""
        self.compute, self.device, self.notes = compute, device, notes
        self.recording = True
        self.most_tokens = most_tokens
        self.transfer = Transfer(device)
        self.recordings: dict[StepShape, Recording] = {}  # those replayed last come last
        self.met: Counter[StepShape] = Counter()  # how often each shape came
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.replays = self.recorded = self.launched = 0  # number of steps without prompt tokens
        if device.type == "cuda":
            self.graph_memory = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch) -> Found:
        """Start a step; return what it finds, in tensors that it fills later."""
        if batch.prompt_tokens:
            return self.compute(self.transfer.send(batch))
        recording = self._recording_for(batch)
        if recording is None:
            self.launched += 1
            return self.compute(self.transfer.send(batch))
        self.transfer.copy(partial(recording.inputs.write, batch), recording.buffer)
        recording.replay()
        rows = len(batch.places)
        return recording.tokens[:rows], recording.finite[:rows], StepScores()

    def keep_within(self, nbytes: int, step_bytes: int) -> None:
        """Record only steps that fit in `nbytes`, where one of `most_tokens` tokens takes `step_bytes` to compute."""
        share = (nbytes - MOST_RECORDINGS * RECORDING_BYTES) / step_bytes
        self.most_tokens = largest_count(int(self.most_tokens * min(1.0, share)))

    def _recording_for(self, batch: Batch) -> Recording | None:
        """Return the recording of the step's shape, made now if there is none; None if it is not to be recorded."""
        tokens = padded_count(batch.query_tokens)
        # How many logits change or are scored differs from step to step: such steps never have the same shape twice.
        # What grammars allow is found only while a step runs.
        differing = batch.changes, batch.labels, batch.scoring, batch.allowed
        if any(what is not None for what in differing) or not self.recording:
            return None
        if tokens > self.most_tokens:
            self._note_large_steps()
            return None
        shape = StepShape.of(batch, tokens)
        self.met[shape] += 1
        if self.met[shape] < OFTEN and shape not in self.recordings:
            shape = StepShape.of(batch, min(doubled(1, tokens), self.most_tokens))
        if (recording := self.recordings.pop(shape, None)) is None:
            recording = self._record_largest_first(batch, shape)
            self.recorded += recording is not None
        else:
            self.replays += 1
        if recording is not None:
            self.recordings[shape] = recording
        return recording

    def _note_large_steps(self) -> None:
        note = (
            f"decoding steps of more than {self.most_tokens} tokens were launched kernel by kernel on the GPU, not as "
            "recorded graphs"
        )
        if self.most_tokens < MOST_TOKENS:
            note += ": memory holds no larger ones"
        if note not in self.notes:
            self.notes.append(note)

    def _record_largest_first(self, batch: Batch, shape: StepShape) -> Recording | None:
        """Record a shape; before the first one the largest, so that the others find room in what it has freed."""
        try:
            if self.device.type == "cuda" and not self.recordings:
                largest = StepShape.of(batch, self.most_tokens)
                self.recordings[largest] = self._record(largest)
            while len(self.recordings) >= MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]
            return self.recordings.get(shape) or self._record(shape)
        except torch.OutOfMemoryError:
            self.recording = False
            self.recordings.clear()
            self.notes.append(
                "the device's memory did not hold recorded steps: all were launched kernel by kernel from then on; "
                "a lower --gpu-memory-utilization avoids it"
            )
            return None

    def _record(self, shape: StepShape) -> Recording:
        """Record a step of padding alone, which changes nothing but block 0."""
        inputs = StepBuffer(shape)
        if len(self.buffer) < inputs.nbytes:
            self.buffer = torch.empty(2 * inputs.nbytes, dtype=torch.uint8, device=self.device)
        buffer = self.buffer[: inputs.nbytes]
        there = inputs.batch(buffer)
        if self.device.type == "cuda":
            self.transfer.copy(inputs.write_padding, buffer)
            self.compute(there)  # before recording, because kernels are compiled at their first call
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_memory):
                tokens, finite, _ = self.compute(there)
            return Recording(inputs, buffer, graph.replay, tokens, finite)
        # On the CPU, for tests: the same code without a graph.
        tokens, finite = (torch.empty(shape.tokens, dtype=kind) for kind in (torch.int64, torch.bool))

        def replay() -> None:
            for into, new in zip((tokens, finite), self.compute(there)[:2], strict=True):
                into.copy_(new)

        return Recording(inputs, buffer, replay, tokens, finite)
