"""A canary: a few rows of a job, through its engine and through a reference, before the hours are spent."""

import sys
import tempfile
import time
import traceback
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.request import Requests
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.formats.gguf_file import GGUFFile
from batchinfer.jobs.log import printable, say
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.process.messages import Fault, Found
from batchinfer.jobs.process.worker import Worker
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.jobs.rows.windows import Prompts
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.kernels.ragged import offsets_of
from batchinfer.models.gguf_folder import WEIGHTS
from batchinfer.models.hub import read_config, resolve_model
from batchinfer.text.stop import before_stop
from batchinfer.text.tokenizer import Tokenizer

POLL_SECONDS = 0.2
BATCH_ROWS = 64  # tokenized for the sake of one
UNQUANTIZED = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Canary:
    """How near the job's answers are to the reference's."""

    rows: int  # for which the reference has an answer
    reference: str
    identical: int  # rows with the same text
    prefix: float  # share of the reference's answer that comes before the first other token, the mean over rows
    tokens: int  # of the reference's answers, end of text included; along these, given to both:
    top1_agreement: float  # share of them for which both models' likeliest token is the same
    divergence: float  # nats a token, mean Kullback-Leibler divergence from the reference
    seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """For the report's table."""
        return [
            ("canary", f"{self.rows:,} rows beside {self.reference}, in {self.seconds:.1f} s"),
            ("  same text", f"{self.identical:,} of {self.rows:,} rows"),
            ("  same beginning", f"{100 * self.prefix:.1f} % of the reference's answer"),
            ("  along the answer", f"top-1 agreement {100 * self.top1_agreement:.2f} %"),
            ("  KL divergence", f"{self.divergence:.6f} nats a token"),
        ]


@dataclass(frozen=True)
class Comparison:
    """What the child is to do."""

    spec: JobSpec
    config: EngineConfig
    reference: EngineConfig
    tokenizer: Path | None  # a folder, where it is not the model's own
    requests: Requests


def reference_config(spec: JobSpec, config: EngineConfig) -> EngineConfig:
    """The engine that the job is compared with: floating point, of the same model or of `--canary-reference`.

    Raises `UsageError` where that would be the job's own engine, or the same quantized checkpoint.
    """
    quantized = _is_quantized(config.model)
    if spec.canary_reference is None and quantized:
        raise UsageError(
            f"--canary {spec.canary}: {spec.model} is quantized already; name the checkpoint that it was made from "
            "with --canary-reference"
        )
    named = spec.canary_reference
    model = config.model if named is None else resolve_model(named, None, tokenizer=False)
    if named is not None and _is_quantized(model):
        raise UsageError(
            f"--canary-reference {named} is quantized itself; name the checkpoint in floating point that it was made "
            "from"
        )
    plain = not quantized and config.quantization in ("auto", "none") and config.kv_cache_dtype == "auto"
    if plain and model == config.model:
        raise UsageError(
            f"--canary {spec.canary} shows what quantization costs, but --quantization is {spec.quantization} and "
            f"{spec.model} is in floating point: leave --canary out, or quantize"
        )
    off = Speculation("off")  # for some rows it is not worth a draft model's second copy in memory
    return replace(config, model=model, quantization="none", kv_cache_dtype="auto", speculation=off)


def _is_quantized(model: Path) -> bool:
    if (model / WEIGHTS).exists():
        return bool({tensor.type for tensor in GGUFFile(model / WEIGHTS).tensors.values()} - UNQUANTIZED)
    return bool(read_config(model).get("quantization_config"))


def canary_rows(table: Table, prompts: Prompts, count: int) -> Requests:
    """`count` rows that have a prompt, spread evenly over the table; fewer where there are not as many.

    From `count` places at even distances on, each time the next row that has one. Raises `Refused` where none has.
    """
    places = np.arange(count) * table.num_rows // count
    chosen: list[Requests] = []
    found = 0
    for first, batch in table.batches(prompts.columns, BATCH_ROWS):
        if found == count:
            break
        if places[found] >= first + batch.num_rows:
            continue
        requests, _ = prompts.tokenize(first, batch)
        taken = []
        for i, row in enumerate(requests.rows.tolist()):
            if found < count and row >= places[found]:
                taken.append(i)
                found += 1
        chosen.append(requests.take(np.array(taken, np.int64)))
    if not found:
        raise Refused(f"--canary {count}: there is no row with a prompt to compare")
    return _joined(chosen)


def _joined(slices: list[Requests]) -> Requests:
    """The requests of all slices, one after the other."""
    params = tuple(dict.fromkeys(p for requests in slices for p in requests.params))
    place = {p: i for i, p in enumerate(params)}
    lengths = np.concatenate([np.diff(requests.offsets) for requests in slices])
    return Requests(
        np.concatenate([requests.rows for requests in slices]),
        np.concatenate([requests.token_ids for requests in slices]),
        offsets_of(lengths),
        np.concatenate([requests.seeds for requests in slices]),
        params,
        np.concatenate(
            [np.array([place[p] for p in r.params], np.int32)[r.param_index] for r in slices], dtype=np.int32
        ),
    )


def run_canary(comparison: Comparison, interruption: Interruption) -> Canary:
    """Compare, in a child process, and print what was found. Its log is a temporary file, kept where it fails.

    Raises `Refused` and `EngineFailed` as the job does, and `Interrupted`.
    """
    with tempfile.NamedTemporaryFile(prefix="batchinfer-canary-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    rows = len(comparison.requests)
    say(f"canary: {rows} rows, beside {_reference_name(comparison.spec)}")
    with closing(Worker(log, compare, comparison)) as worker:
        while (message := worker.receive(POLL_SECONDS)) is None:
            if interruption.requested:
                raise Interrupted("stopped while the canary ran, before the first row")
    assert isinstance(message, Found)
    canary: Canary = message.value
    log.unlink()
    print("\n".join(printable(f"{name:<20}{value}") for name, value in canary.lines()), file=sys.stderr, flush=True)
    return canary


def _reference_name(spec: JobSpec) -> str:
    return spec.canary_reference or f"{spec.model} without quantization"


def same_beginning(ours: list[int], theirs: list[int]) -> float:
    """The share of their answer, which is not empty, that comes before the first token in which ours differs."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    return same / len(theirs)


def compare(pipe: Any, comparison: Comparison) -> None:
    """The child's life: both engines at once, row by row."""
    from batchinfer.engine.own_engine import own_engine
    from batchinfer.quality.evaluator import answers, check_vocabularies, distance_along

    started = time.monotonic()
    spec, requests = comparison.spec, comparison.requests
    figures = LengthFigures.of(StoredRequests.of(requests), np.arange(len(requests)), spec.block_size)
    tokens = figures.kv_cache_tokens(comparison.config.max_num_seqs)
    try:
        tokenizer = Tokenizer.load(comparison.config.model, comparison.tokenizer)
        engine, reference = (
            own_engine(replace(config, kv_cache_tokens=tokens), tokenizer)
            for config in (comparison.config, comparison.reference)
        )
        check_vocabularies(engine.runner, reference.runner)
    except (ValueError, OSError) as error:
        traceback.print_exc()
        pipe.send(Fault(str(error), refused=True))
        return
    found, expected = answers(engine, requests), answers(reference, requests)
    rows, identical, prefixes, length, divergence, agreed = 0, 0, 0.0, 0, 0.0, 0
    for i, row in enumerate(requests.rows.tolist()):
        ours, theirs = found[row], expected[row]
        offsets = np.cumsum([0, len(ours), len(theirs)])
        texts = tokenizer.decode_batch(np.array(ours + theirs, np.int32), offsets)
        if not theirs:  # the reference computed values that are not finite
            continue
        rows += 1
        identical += len({before_stop(text, spec.sampling.stop) for text in texts}) == 1
        prefixes += same_beginning(ours, theirs)
        prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]].tolist()
        nats, likeliest = distance_along(engine, reference, prompt, theirs)
        divergence, agreed, length = divergence + nats, agreed + likeliest, length + len(theirs)
    pipe.send(
        Found(
            Canary(
                rows=rows,
                reference=_reference_name(spec),
                identical=identical,
                prefix=prefixes / max(rows, 1),
                tokens=length,
                top1_agreement=agreed / max(length, 1),
                divergence=divergence / max(length, 1),
                seconds=time.monotonic() - started,
            )
        )
    )
