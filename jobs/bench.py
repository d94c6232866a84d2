"""Running synthetic prompts as a job, to measure how fast this machine runs a model, or a model's shape."""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers.models import WordLevel

from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import EngineFailed, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.process.messages import TORCH_ENGINE
from batchinfer.jobs.report import Report
from batchinfer.jobs.spec import JobSpec
from batchinfer.kernels.ragged import offsets_of
from batchinfer.models.config import read_shape
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer

STUB_ENGINE = "batchinfer.jobs.process.stub_engine:StubEngine"
STUB_VOCABULARY = 32_000
GROUP_TOKENS = 1 << 20
TOKEN_IDS = "prompt_token_ids"


@dataclass(frozen=True)
class Workload:
    """`num_prompts` rows of `input_len` random token ids, each answered with exactly `output_len` tokens."""

    num_prompts: int = 256
    input_len: int = 256
    output_len: int = 64
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)  # fields of `JobSpec`, as in a job

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}; it must be 1 or more")


class TokenIdPrompts:
    """Makes requests from prompts that are token ids already."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, schema: pa.Schema) -> None:
        self.columns = [TOKEN_IDS]
        self._params = spec.sampling

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        """Return requests for all rows."""
        column, n = batch.column(TOKEN_IDS), batch.num_rows
        offsets = offsets_of(column.value_lengths().to_numpy())
        rows = np.arange(first_row, first_row + n)
        token_ids = column.flatten().to_numpy()
        return Requests.alike(rows, token_ids, offsets, self._params), {}


def bench(model: str | None, revision: str | None, workload: Workload, stub: bool) -> Report:
    """Run the workload and return its report. Raises as `run` does.

    With `stub`, no engine computes; `model`, if given, is used for its vocabulary size only.
    """
    if model is None and not stub:
        raise UsageError("give --model, or --stub to measure the job layer alone")
    shape = None if model is None else resolve_model(model, revision)
    vocabulary = STUB_VOCABULARY if shape is None else read_shape(shape).vocab_size
    folder = Path(tempfile.mkdtemp(prefix="batchinfer-bench-"))
    try:
        spec = _spec(folder, shape, vocabulary, workload)
        report = run(spec, STUB_ENGINE if stub else TORCH_ENGINE, TokenIdPrompts)
    except EngineFailed:
        raise  # the folder is kept, since the engine's log is in it
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return replace(report, model=model or "none", output="none")


def figures(workload: Workload, report: Report) -> dict[str, Any]:
    """Return the figures under the names that benchmarks of other engines use, and the whole report."""
    rates = report.tokens_per_second
    return {
        "num_prompts": workload.num_prompts,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "elapsed_time": report.generate_seconds,
        "requests_per_second": report.rows_per_second,
        "input_tokens_per_second": rates["input"],
        "output_tokens_per_second": rates["output"],
        "total_tokens_per_second": rates["total"],
        "input_tokens": report.prompt_tokens,
        "output_tokens": report.completion_tokens,
        "report": asdict(report),
    }


def _spec(folder: Path, shape: Path | None, vocabulary: int, workload: Workload) -> JobSpec:
    """Write prompts to `folder`, and a tokenizer if the model has none. Returns the job that runs them."""
    prompts = folder / "prompts.parquet"
    _write_prompts(prompts, workload, vocabulary)
    numbers = None if shape is not None and (shape / "tokenizer.json").exists() else folder / "tokenizer"
    if numbers is not None:
        _write_tokenizer(numbers, vocabulary, workload.input_len + workload.output_len)
    return JobSpec(
        inputs=(prompts,),
        output=folder / "answers.parquet",
        model=str(shape or numbers),
        tokenizer=None if numbers is None else str(numbers),
        prompt_column=TOKEN_IDS,
        columns=("id",),
        sampling=SamplingParams(max_tokens=workload.output_len, ignore_eos=True),
        generation_config="none",
        max_model_len=workload.input_len + workload.output_len,
        deduplicate=False,  # every row must be computed
        **workload.engine,
    )


def _write_tokenizer(folder: Path, vocabulary: int, length: int) -> None:
    """Write a tokenizer whose tokens are numbers, and the config.json of the least model with that vocabulary."""
    folder.mkdir()
    least = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 2)
    config = {"model_type": "llama", "head_dim": 2, "vocab_size": vocabulary, "max_position_embeddings": length}
    (folder / "config.json").write_text(json.dumps({**least, **config}))
    numbers = WordLevel({f" {i}": i for i in range(vocabulary)}, " 0")
    tokenizers.Tokenizer(numbers).save(str(folder / "tokenizer.json"))


def _write_prompts(path: Path, workload: Workload, vocabulary: int) -> None:
    rng = np.random.default_rng(workload.seed)
    schema = pa.schema([("id", pa.int64()), (TOKEN_IDS, pa.list_(pa.int32()))])
    group_rows = max(1, GROUP_TOKENS // workload.input_len)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, workload.num_prompts, group_rows):
            n = min(group_rows, workload.num_prompts - first)
            token_ids = pa.array(rng.integers(0, vocabulary, n * workload.input_len, np.int32))
            offsets = pa.array(np.arange(n + 1, dtype=np.int32) * workload.input_len)
            lists = pa.ListArray.from_arrays(offsets, token_ids)
            writer.write_table(pa.Table.from_arrays([pa.array(range(first, first + n)), lists], schema=schema))
