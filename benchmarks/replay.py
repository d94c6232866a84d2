"""How many decoding steps a GPU would replay, and what a step takes on the host: simulated jobs, without a GPU.

    python benchmarks/replay.py [--jobs NAME ...]

Engine, scheduler, attention plans and padding are those of a job on a GPU with 132 multiprocessors; only the model is
left out: a step samples the same token in every row, at once. So the host's time is all but that of launching, and of
waiting. Lengths are drawn from lognormal distributions. The memory is a bound for the model's shape, weights in
bfloat16: what the largest recorded step computes, the inputs, and what the driver keeps for each recording.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from conditions import conditions

from batchinfer.engine.attention_inputs import RaggedInputs
from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.cuda_graphs import MOST_RECORDINGS, RECORDING_BYTES, CudaGraphs, Found, most_recorded
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.engine.transfer import Sampled
from batchinfer.kernels.attention_triton import tiling
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig, read_model_config
from batchinfer.text.tokenizer import Tokenizer

SHAPE = Path(__file__).resolve().parent / "shapes" / "llama-3-8b"
HOPPER = Gpu("H100", (9, 0), 132, 227 << 10)
CONTEXT = 4096
VOCABULARY = 1000  # of the prompts
DEVIATION = 0.9  # of the lengths' logarithms
TOKEN = 7  # what every row samples


@dataclass(frozen=True)
class Job:
    """Rows, how many run side by side, and the mean lengths of prompts and answers."""

    rows: int
    sequences: int
    prompt: int
    answer: int
    ragged: bool = True
    drafts: bool = False
    deterministic: bool = False


JOBS = {
    "600 ragged": Job(600, 256, 200, 180),
    "64 ragged": Job(64, 64, 200, 180),
    "1,500 ragged": Job(1500, 1024, 200, 180),
    "equal lengths": Job(512, 256, 128, 128, ragged=False),
    "600 ragged, deterministic": Job(600, 256, 200, 180, deterministic=True),
    "64 ragged, drafts": Job(64, 64, 200, 180, drafts=True),
    "600 ragged, drafts": Job(600, 256, 200, 180, drafts=True),
    "1,500 ragged, drafts": Job(1500, 1024, 200, 180, drafts=True),
    "equal lengths, drafts": Job(512, 256, 128, 128, ragged=False, drafts=True),
}


class Numbers(Tokenizer):
    """Token ids alone; none of them ends a text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_ids = vocab_size, ()


class _Decoder:
    row_grain, weight_bytes, operations_per_token = 1, 16 << 30, 1
    head = type("Head", (), {"operations_per_row": 1})


class _Runner:
    """Stands for the model's runner on a GPU: everything that it does on the host, and nothing of the model."""

    device_name, bytes_per_token, bytes_per_state, late, kv_dtype = "no device", 1, 0, 1, torch.bfloat16
    logits_grain = MIN_ROWS
    decoder = _Decoder

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.notes: list[str] = []
        self.seconds = 0.0  # of sending steps, and of replaying them
        self.a = model.layers[0].attention
        processors = None if config.deterministic else HOPPER.processors
        tiles = tiling(self.a.head_dim, self.a.heads // self.a.kv_heads, torch.bfloat16, torch.bfloat16, HOPPER)
        self.attention_inputs = RaggedInputs({self.a.shape: tiles}, processors)
        self.steps = CudaGraphs(self._compute, torch.device("cpu"), most_recorded(config), self.notes)

    def allocate(self, blocks: int, block_size: int, states: int) -> None:
        pass

    def kv_bytes_read(self, batch: Batch) -> tuple[int, int]:
        return 0, 0

    def launch(self, batch: Batch) -> Sampled:
        began = time.process_time()
        sampled = self.steps.run(batch)
        self.seconds += time.process_time() - began
        return Sampled.fetch(*sampled)

    def _compute(self, batch: Batch) -> Found:
        rows = len(batch.places)
        return torch.full((rows,), TOKEN, dtype=torch.int64), torch.ones(rows, dtype=torch.bool), None


@dataclass(frozen=True)
class Counts:
    """Steps of a job by how they ran, and what they took."""

    steps: int
    replayed: int
    recorded: int
    launched: int
    recordings: int
    nbytes: int  # bound on the memory of recordings
    host_ms: float  # time of this process a step
    sending_ms: float  # of that: padding and sending it

    @property
    def prompted(self) -> int:
        """Number of steps with prompt tokens."""
        return self.steps - self.replayed - self.recorded - self.launched

    @property
    def share(self) -> float:
        """Share of the other steps that are replayed."""
        return self.replayed / (self.steps - self.prompted)


def simulate(job: Job, seed: int = 0) -> Counts:
    """Run a job to its end."""
    rng = np.random.default_rng(seed)
    prompts, answers = (_lengths(rng, job, mean) for mean in (job.prompt, job.answer))
    engine = _engine(job)
    engine.add(_requests(rng, prompts, answers))
    began = time.process_time()
    while engine.unfinished:
        engine.step()
    seconds = time.process_time() - began
    stats, graphs = engine._stats, engine.runner.steps
    return Counts(
        stats.steps,
        graphs.replays,
        graphs.recorded,
        graphs.launched,
        len(graphs.recordings),
        _bound(read_model_config(SHAPE), graphs),
        1e3 * seconds / stats.steps,
        1e3 * engine.runner.seconds / stats.steps,
    )


def _lengths(rng: np.random.Generator, job: Job, mean: int) -> Ints:
    if not job.ragged:
        return np.full(job.rows, mean)
    drawn = rng.lognormal(np.log(mean) - DEVIATION**2 / 2, DEVIATION, job.rows)
    return np.clip(drawn, 4, CONTEXT // 2 - 8).astype(np.int64)


def _engine(job: Job) -> Engine:
    tokens = job.sequences * min(CONTEXT, int(2.5 * (job.prompt + job.answer)))
    config = EngineConfig(
        SHAPE,
        max_model_len=CONTEXT,
        max_num_seqs=job.sequences,
        max_num_batched_tokens=8192,
        kv_cache_tokens=tokens,
        deterministic=job.deterministic,
        speculation=Speculation("ngram" if job.drafts else "off", gate=False),
    )
    with patch("batchinfer.engine.engine.ModelRunner", _Runner):
        engine = Engine(config, Numbers(read_model_config(SHAPE).vocab_size))
    torch.set_num_threads(1)
    return engine


def _requests(rng: np.random.Generator, prompts: Ints, answers: Ints) -> Requests:
    lengths, index = np.unique(answers, return_inverse=True)
    return Requests(
        rows=np.arange(len(prompts)),
        token_ids=rng.integers(2, VOCABULARY, int(prompts.sum())).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(prompts)]),
        seeds=np.arange(len(prompts), dtype=np.uint64),
        params=SamplingTable.of([SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths.tolist()]),
        param_index=index.astype(np.int32),
    )


def _bound(model: ModelConfig, graphs: CudaGraphs) -> int:
    """Return the most bytes that recordings take, by arithmetic."""
    tokens = graphs.most_tokens
    layer = model.layers[0]
    inner = layer.feed_forward.gate.rows
    widths = 4 * model.hidden_size + 2 * (layer.attention.q.rows + 2 * layer.attention.k.rows) + 3 * inner
    logits = model.vocab_size * (2 + 4)  # in bfloat16 and in float32
    return tokens * (2 * widths + logits) + len(graphs.buffer) + MOST_RECORDINGS * RECORDING_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    names = parser.parse_args().jobs
    print(*(f"{name}: {value}" for name, value in conditions().items()), sep="; ", end="\n\n")
    titles = (
        "rows",
        "sequences",
        "steps",
        "with prompts",
        "replayed",
        "recorded",
        "eager decoding",
        "share of decoding",
    )
    titles = ("job", *titles, "recordings kept", "memory at most, MB", "host, ms a step", "of it to send it")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for name in names:
        job, c = JOBS[name], simulate(JOBS[name])
        cells = (job.rows, job.sequences, c.steps, c.prompted, c.replayed, c.recorded, c.launched, f"{c.share:.1%}")
        cells = (name, *cells, c.recordings, f"{c.nbytes / 1e6:.0f}", f"{c.host_ms:.2f}", f"{c.sending_ms:.2f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
