"""The canary: its figures against transformers, its rows, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from engines import engine_of
from repository import TARGET
from safetensors.torch import load_file, save_file

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.canary import canary_rows, reference_config, same_beginning
from batchinfer.jobs.fingerprints import model_digest
from batchinfer.jobs.job import run
from batchinfer.jobs.plan.quality_file import Quality, read_qualities
from batchinfer.jobs.report import read_report
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.quality.evaluator import answers, distance_along

PROMPTS = [
    f"def {name}(self, x):\n    " for name in ("read", "write", "close", "flush", "seek", "tell", "open", "next")
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with noise on its weights: in floating point still, and so within transformers' reach."""
    folder = tmp_path_factory.mktemp("spoiled") / "model"
    shutil.copytree(TARGET, folder)
    for path in folder.glob("*.safetensors"):
        torch.manual_seed(0)
        weights = {
            name: w
            if w.ndim < 2 or "embed" in name
            else w + (0.25 * w.float().std() * torch.randn(w.shape)).to(w.dtype)
            for name, w in load_file(path).items()
        }
        save_file(weights, path, {"format": "pt"})
    return folder


def job(folder: Path, model: Path, **fields: object) -> JobSpec:
    """Of eight prompts, the second of which is missing."""
    pq.write_table(pa.table({"prompt": [PROMPTS[0], None, *PROMPTS[2:]]}), folder / "in.parquet")
    base = JobSpec(
        inputs=(folder / "in.parquet",),
        output=folder / "out.parquet",
        model=str(model),
        prompt_column="prompt",
        sampling=SamplingParams(max_tokens=24),
        dtype="float32",
        max_model_len=200,
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def test_the_figures_are_those_of_transformers(
    tmp_path: Path, spoiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = job(tmp_path, spoiled, canary=4, canary_reference=str(TARGET))
    report = run(spec)
    canary = report.canary
    assert canary is not None

    tokenizer = tokenizers.Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    wrong, right = (load(model, dtype=torch.float32).eval() for model in (spoiled, TARGET))
    identical, prefixes, tokens, agreed, divergence = 0, [], 0, 0, 0.0
    for row in (0, 2, 4, 6):
        prompt = torch.tensor([tokenizer.encode(PROMPTS[row]).ids])
        with torch.no_grad():
            ours, theirs = (
                m.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=1)[
                    0, prompt.shape[1] :
                ]
                for m in (wrong, right)
            )
            whole = torch.cat([prompt[0], theirs])[None, :-1]
            q, p = (m(whole).logits[0, prompt.shape[1] - 1 :].double().log_softmax(-1) for m in (wrong, right))
        identical += tokenizer.decode(ours.tolist()) == tokenizer.decode(theirs.tolist())
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        prefixes.append(same / len(theirs))
        tokens += len(theirs)
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
    assert 0 < sum(prefixes) < 4 and identical < 4, "or the test shows nothing"
    assert (canary.rows, canary.identical, canary.tokens) == (4, identical, tokens)
    assert canary.prefix == pytest.approx(sum(prefixes) / 4)
    assert canary.top1_agreement == pytest.approx(agreed / tokens)
    assert canary.divergence == pytest.approx(divergence / tokens, rel=1e-3)

    (known,) = read_qualities(model_digest(spoiled)).values()
    assert known == Quality(canary.divergence, canary.top1_agreement, tokens, canary.reference, "canary")
    printed = capsys.readouterr().err
    assert printed.index(f"rows with {TARGET}") < printed.index("KL divergence") < printed.index("batchinfer: loading")
    assert read_report(spec.output) == report
    shown = report.table()
    assert f"4 rows compared with {TARGET}" in shown and f"{canary.divergence:.6f} nats a token" in shown
    noted = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert (noted["spec"]["canary"], noted["spec"]["canary_reference"]) == (4, str(TARGET))
    assert noted["canary_engine"]["model"] == str(TARGET) and noted["canary_engine"]["quantization"] == "none"

    with_canary = pq.read_table(spec.output)
    assert run(replace(spec, canary=0, canary_reference=None, overwrite=True)).canary is None
    assert pq.read_table(spec.output).equals(with_canary)


def test_an_engine_that_cannot_be_is_refused_as_in_the_job(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    other = tmp_path / "other"
    shutil.copytree(make_model("llama", vocab_size=5000), other)
    for fields, message in (
        ({"canary_reference": str(other)}, "vocab_size is 4096 in the model and 5000 in the reference"),
        ({"quantization": "w8a8-int8", "max_model_len": 5000}, "max_model_len is 5000; it must be from 2 to 1152"),
    ):
        spec = job(tmp_path, TARGET, canary=2, **fields)
        with pytest.raises(Refused, match=message):
            run(spec)
        assert not spec.output.exists() and not (tmp_path / "out.run").exists()
    spec = job(tmp_path, TARGET, canary=2, quantization="w8a8-int8")
    pq.write_table(pa.table({"prompt": pa.nulls(3, pa.string())}), tmp_path / "in.parquet")
    with pytest.raises(Refused, match="--canary 2: no row has a prompt to compare"):
        run(spec)


def test_what_the_reference_is(tmp_path: Path) -> None:
    config = EngineConfig(TARGET, quantization="w8a8-int8", dtype="float32", max_num_seqs=3)
    spec = job(tmp_path, TARGET, canary=2)
    plain = replace(config, quantization="none", speculation=Speculation("off"))
    assert reference_config(spec, config) == plain
    assert reference_config(spec, replace(plain, kv_cache_dtype="int8")) == plain
    for same in (plain, replace(plain, quantization="auto")):
        with pytest.raises(UsageError, match=r"--canary 2 shows what quantization costs, but .* in floating point"):
            reference_config(spec, same)
    made = tmp_path / "w4"
    made.mkdir()
    stored = {**json.loads((TARGET / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}}
    (made / "config.json").write_text(json.dumps(stored))
    quantized = replace(config, model=made, quantization="auto")
    spec = job(tmp_path, made, canary=2)
    with pytest.raises(UsageError, match=r"w4 is quantized; name .* with --canary-reference"):
        reference_config(spec, quantized)
    assert reference_config(replace(spec, canary_reference=str(TARGET)), quantized) == plain
    with pytest.raises(UsageError, match=r"--canary-reference .*w4 is quantized itself; name the checkpoint"):
        reference_config(replace(spec, canary_reference=str(made)), quantized)
    with pytest.raises(UsageError, match="--canary-reference needs --canary N"):
        job(tmp_path, TARGET, canary_reference="m")
    with pytest.raises(UsageError, match="--canary is -1; it must be 0 or more"):
        job(tmp_path, TARGET, canary=-1)


def test_the_beginning_ends_at_the_first_difference() -> None:
    assert same_beginning([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert same_beginning([1, 2], [1, 2, 3, 4, 5]) == 0.4
    assert same_beginning([1, 2, 3], [1, 2]) == 1.0
    assert same_beginning([], [1, 2]) == 0.0


class Numbers:
    """Prompts of one token; rows without a number have none."""

    columns = ("n",)

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        numbers = batch.column("n").to_pylist()
        good = [i for i, n in enumerate(numbers) if n is not None]
        requests = Requests.of([[numbers[i]] for i in good], SamplingParams())
        return replace(requests, rows=first_row + np.array(good, np.int64)), {}


@pytest.mark.parametrize(
    ("rows", "without", "count", "expected"),
    [
        (10, [], 3, [0, 3, 6]),
        (10, [], 10, [*range(10)]),
        (3, [], 10, [0, 1, 2]),
        (1000, [], 4, [0, 250, 500, 750]),
        (1000, [*range(200)], 4, [200, 250, 500, 750]),
        (1000, [*range(700)], 4, [700, 701, 702, 750]),
        (1000, [*range(240, 760)], 4, [0, 760, 761, 762]),
        (1000, [*range(600, 1000)], 4, [0, 250, 500]),
    ],
)
def test_rows_are_spread_evenly(tmp_path: Path, rows: int, without: list[int], count: int, expected: list[int]) -> None:
    column = [None if n in without else n for n in range(rows)]
    pq.write_table(pa.table({"n": pa.array(column, pa.int64())}), tmp_path / "n.parquet", row_group_size=300)
    requests = canary_rows(Table.open([tmp_path / "n.parquet"]), Numbers(), count)  # type: ignore[arg-type]
    assert requests.rows.tolist() == requests.token_ids.tolist() == expected


def test_a_long_row_is_compared_in_several_steps(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    window = np.random.default_rng(0).integers(2, 320, 230).tolist()
    sums = []
    for width in (256, 64):
        pair = [
            engine_of(model, quantization=name, max_num_batched_tokens=width) for name in ("w8a8-int8+head", "none")
        ]
        sums.append(distance_along(*pair, window[:100], window[100:]))
        assert [e.scheduler.unfinished for e in pair] == [0, 0]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4) and sums[0][0] > 0 and 0 < sums[0][1] <= 130
    requests = Requests.of([window[:5], window[:9]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert {row: len(new) for row, new in answers(engine_of(model), requests).items()} == {0: 3, 1: 3}
