"""The canary: before a long job, a few of its rows run through its engine and a reference, to compare the answers."""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.request import Requests, params_of_all
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.log import printable, say, writes_json
from batchinfer.jobs.plan.quality_file import Quality, write_quality
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.process.messages import Fault, Found
from batchinfer.jobs.process.worker import Worker
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.jobs.rows.windows import Prompts
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.kernels.ragged import offsets_of
from batchinfer.models.gguf_folder import weight_files
from batchinfer.models.hub import read_config, resolve_model
from batchinfer.text.stop import Stop, printed_answers
from batchinfer.text.tokenizer import Tokenizer

POLL_SECONDS = 0.2
BATCH_ROWS = 64  # rows that are tokenized to find one with a prompt
UNQUANTIZED = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Canary:
    """The result of a canary: figures of how close the job's answers are to the reference's."""

    rows: int  # rows for which the reference has an answer
    reference: str
    identical: int  # rows with the same text
    prefix: float  # share of the reference's answer before the first token that differs, as the mean over rows
    tokens: int  # of the reference's answers, end of text included. Both models read these tokens to compute:
    top1_agreement: float  # share of the tokens for which both models' likeliest token is the same
    divergence: float  # mean Kullback-Leibler divergence from the reference, in nats a token
    seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """Return lines for the report's table."""
        return [
            ("canary", f"{count_of(self.rows, 'row')} compared with {self.reference} in {self.seconds:.1f} s"),
            ("  same text", f"{self.identical:,} of {self.rows:,} rows"),
            ("  same beginning", f"{100 * self.prefix:.1f} % of the reference's answer"),
            ("  top-1 agreement", f"{100 * self.top1_agreement:.2f} % of the answer's tokens"),
            ("  KL divergence", f"{self.divergence:.6f} nats a token"),
        ]


@dataclass(frozen=True)
class Comparison:
    """The task of the child process."""

    spec: JobSpec
    config: EngineConfig
    reference: EngineConfig
    tokenizer: Path | None  # folder of the tokenizer; None: the model's own
    requests: Requests


def kept_for_plans(canary: Canary, spec: JobSpec, config: EngineConfig, model: str) -> list[str]:
    """Keep what the canary found of a model, named by its digest, for later plans. Returns notes."""
    if spec.random_weights or not canary.tokens:
        return []
    found = Quality(canary.divergence, canary.top1_agreement, canary.tokens, canary.reference, "canary")
    return write_quality(model, config, found)


def reference_config(spec: JobSpec, config: EngineConfig) -> EngineConfig:
    """Return the config of the reference engine: in floating point, with the same model or `--canary-reference`.

    Raises `UsageError` if the reference would be quantized, or equal to the job's own engine.
    """
    quantized = _is_quantized(config.model)
    if spec.canary_reference is None and quantized:
        raise UsageError(
            f"--canary {spec.canary} needs a reference, since {spec.model} is quantized; name the checkpoint that it "
            "was made from with --canary-reference"
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
            f"{spec.model} is in floating point; leave out --canary, or quantize"
        )
    off = Speculation("off")  # not worth a second copy of a draft model in memory for a few rows
    return replace(config, model=model, quantization="none", kv_cache_dtype="auto", speculation=off)


def _is_quantized(model: Path) -> bool:
    if files := weight_files(model):
        return bool({tensor.type for tensor in GGUFParts(files).tensors.values()} - UNQUANTIZED)
    return bool(read_config(model).get("quantization_config"))


def canary_rows(table: Table, prompts: Prompts, count: int) -> Requests:
    """Return `count` rows that have a prompt, spread evenly over the table; fewer if there are not as many.

    From each of `count` evenly spaced positions on, the next row with a prompt is taken. Raises `Refused` if no row has
    a prompt.
    """
    positions = np.arange(count) * table.num_rows // count
    chosen: list[Requests] = []
    found = 0
    for first, batch in table.batches(prompts.columns, BATCH_ROWS):
        if found == count:
            break
        if positions[found] >= first + batch.num_rows:
            continue
        requests, _ = prompts.tokenize(first, batch)
        taken = []
        for i, row in enumerate(requests.rows.tolist()):
            if found < count and row >= positions[found]:
                taken.append(i)
                found += 1
        chosen.append(requests.take(np.array(taken, np.int64)))
    if not found:
        raise Refused(f"--canary {count}: no row has a prompt to compare; leave out --canary")
    return _joined(chosen)


def _joined(slices: list[Requests]) -> Requests:
    """Join the requests of all slices."""
    lengths = np.concatenate([np.diff(requests.offsets) for requests in slices])
    return Requests(
        np.concatenate([requests.rows for requests in slices]),
        np.concatenate([requests.token_ids for requests in slices]),
        offsets_of(lengths),
        np.concatenate([requests.seeds for requests in slices]),
        *params_of_all(slices),
    )


def run_canary(comparison: Comparison, interruption: Interruption, tick: Callable[[], None]) -> Canary:
    """Compare in a child process, and print the result. The log is a temporary file, which is kept if the child fails.
    `tick` is called often meanwhile.

    Raises `Refused` and `EngineFailed` as the job does, and `Interrupted`.
    """
    with tempfile.NamedTemporaryFile(prefix="batchinfer-canary-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    rows = len(comparison.requests)
    say(f"canary: comparing {count_of(rows, 'row')} with {_reference_name(comparison.spec)}", "canary", rows_total=rows)
    with closing(Worker(log, compare, comparison)) as worker:
        while (message := worker.receive(POLL_SECONDS)) is None:
            tick()
            if interruption.requested:
                raise Interrupted("stopped during the canary, before the job's first row")
    assert isinstance(message, Found)
    canary: Canary = message.value
    log.unlink()
    if writes_json():
        say("canary: the rows are compared", "canary", **asdict(canary))
    else:
        print("\n".join(printable(f"{name:<20}{value}") for name, value in canary.lines()), file=sys.stderr, flush=True)
    return canary


def _reference_name(spec: JobSpec) -> str:
    return spec.canary_reference or f"{spec.model} without quantization"


def same_beginning(ours: list[int], theirs: list[int]) -> float:
    """Return the share of `theirs`, which must not be empty, that comes before the first token that differs in
    `ours`."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    return same / len(theirs)


def compare(pipe: Any, comparison: Comparison) -> None:
    """Run the comparison in the child, with both engines in memory, row by row."""
    from batchinfer.engine.own_engine import own_engine
    from batchinfer.quality.evaluator import answers, check_vocabularies, distance_along

    started = time.monotonic()
    spec, requests = comparison.spec, comparison.requests
    figures = LengthFigures.of(StoredRequests.of(requests), np.arange(len(requests)), comparison.config.block_size)
    tokens = figures.kv_cache_tokens(comparison.config.max_num_seqs)
    try:
        tokenizer = Tokenizer.load(comparison.config.model, comparison.tokenizer, chats=False)
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
        params = requests.params[requests.param_index[i]]
        stops = [Stop(params.stop, params.stop_token_ids)] * 2
        texts = printed_answers(tokenizer, np.array(ours + theirs, np.int32), offsets, stops)
        if not theirs:  # the reference computed values that are not finite
            continue
        rows += 1
        identical += len(set(texts)) == 1
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
