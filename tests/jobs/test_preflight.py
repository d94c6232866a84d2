"""What is chosen once for a job is the same in each of its shards, and in the plan of each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured_devices import SHAPE
from quantized_models import FORMATS
from safetensors.torch import save_file
from stub_jobs import STUB, make_model, prompts, spec, write

from batchinfer.engine.config import FEW_ROWS, Speculation
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.spec import sharded

few_examples = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@few_examples
@given(
    rows=st.integers(0, 40),
    count=st.integers(1, 12),
    n=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]),
    places=st.sampled_from([None, 1, 5]),
)
def test_all_shards_multiply_4_bit_weights_as_the_whole_job_does(
    tmp_path: Path, model: Path, rows: int, count: int, n: int, temperature: float, places: int | None
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(rows))
    sampling = SamplingParams(max_tokens=8, temperature=temperature)
    whole, *shards = (
        preflight(spec(model, path, shard=shard, n=n, sampling=sampling, max_num_seqs=places))
        for shard in (None, *((i, count) for i in range(count)))
    )
    assert {job.config for job in shards} == {whole.config}
    samples = n if temperature else 1
    assert whole.config.few_rows == (min(rows * samples, places or FEW_ROWS + 1) <= FEW_ROWS)
    assert {job.fingerprints["quantization"] for job in shards} == {whole.fingerprints["quantization"]}


def test_the_plan_of_a_shard_is_of_the_job_that_the_shard_began(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9))
    for i in range(2):
        shard = spec(model, path, shard=(i, 2), output=sharded(tmp_path / "out.parquet", i, 2))
        run(shard, STUB)
        assert plan(shard).rows_done == 4 + i


def test_a_checkpoint_without_a_kernel_for_a_gpu_is_refused_before_the_job(tmp_path: Path) -> None:
    """Before a GPU is asked for, so that this runs where there is none."""
    model = make_model(tmp_path, **SHAPE)
    path = write(tmp_path / "in.parquet", prompt=prompts(1))
    raw = json.loads((model / "config.json").read_text())
    for form in ("nvfp4", "fp8-tensor"):
        (model / "config.json").write_text(json.dumps({**raw, "quantization_config": FORMATS[form][0]}))
        preflight(spec(model, path, device="cpu"))
        if form == "nvfp4":
            with pytest.raises(Refused, match="nvfp4-pack-quantized 4 bits, for which there is no kernel on a GPU yet"):
                preflight(spec(model, path, device="cuda"))
        else:
            preflight(spec(model, path, device="cuda"))


def test_layers_without_a_kernel_for_a_gpu_are_refused_before_the_job(tmp_path: Path) -> None:
    model = make_model(tmp_path, **SHAPE | {"model_type": "lfm2", "num_key_value_heads": 1})
    path = write(tmp_path / "in.parquet", prompt=prompts(1))
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2, "full_attn_idxs": [1]}))
    preflight(spec(model, path, device="cpu"))
    with pytest.raises(Refused, match="layers of short convolutions, for which there is no kernel on a GPU yet"):
        preflight(spec(model, path, device="cuda"))


def with_two_experts(model: Path, form: str) -> None:
    """Write a mixture's config.json, and the tensors of the two experts that are read, each with inputs of its own."""
    config, write_matrix = FORMATS[form]
    fields = {
        "model_type": "qwen3_moe", "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4,
        "moe_intermediate_size": 64, "num_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 4,
    }  # fmt: skip
    raw = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    tensors = {}
    for name in (f"model.layers.0.mlp.experts.{i}.{part}_proj" for i in range(2) for part in ("gate", "up", "down")):
        stored, _ = write_matrix(torch.randn(64, 64))
        if ".experts.1." in name and "input_scale" in stored:
            stored["input_scale"] *= 2
        tensors |= {f"{name}.{kind}": tensor.contiguous() for kind, tensor in stored.items()}
    save_file(tensors, model / "model.safetensors")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Let the driver name a GPU of this compute capability."""
    monkeypatch.setattr("batchinfer.host.device.gpu_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("form", "capability", "words"),
    [
        ("pack", None, "the experts' weights are in 4 bits, which have no kernel on a GPU yet"),
        ("fp8-static", (8, 0), "the experts of a layer round their inputs differently, which has no kernel on a GPU"),
        ("fp8-static", (9, 0), None),
        ("fp8-block", (8, 0), None),
        ("int", (8, 0), None),
    ],
)
def test_experts_without_a_kernel_for_a_gpu_are_refused_before_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, capability: tuple[int, int] | None, words: str | None
) -> None:
    on_a_gpu(monkeypatch, capability)
    model, path = make_model(tmp_path, **SHAPE), write(tmp_path / "in.parquet", prompt=prompts(1))
    with_two_experts(model, form)
    preflight(spec(model, path, device="cpu"))
    for quantization in ("none", "w8a8-int8"):
        preflight(spec(model, path, device="cuda", quantization=quantization))
    if words is None:
        preflight(spec(model, path, device="cuda"))
    else:
        with pytest.raises(Refused, match=f"model.layers.0.: {words}"):
            preflight(spec(model, path, device="cuda"))


def test_a_draft_model_without_a_kernel_for_a_gpu_is_refused_before_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    model, path = make_model(tmp_path, **SHAPE), write(tmp_path / "in.parquet", prompt=prompts(1))
    draft = shutil.copytree(model, tmp_path / "draft")
    with_two_experts(draft, "pack")
    drafting = Speculation(model=draft)
    preflight(spec(model, path, device="cpu", speculation=drafting))
    with pytest.raises(Refused, match=f"draft model {draft}: model.layers.0.: the experts' weights are in 4 bits"):
        preflight(spec(model, path, device="cuda", speculation=drafting))


@pytest.mark.parametrize("setting", [{"quantization": "w8a8-fp8"}, {"kv_cache_dtype": "fp8"}])
def test_float8_is_refused_before_the_job_where_a_device_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]
) -> None:
    model, path = make_model(tmp_path, **SHAPE), write(tmp_path / "in.parquet", prompt=prompts(1))
    for capability in ((8, 9), None):  # None: unknown until the engine loads
        on_a_gpu(monkeypatch, capability)
        preflight(spec(model, path, device="cuda", **setting))
    on_a_gpu(monkeypatch, (8, 6))
    with pytest.raises(Refused, match=r"this GPU (multiplies no fp8.*; take w8a8-int8|has no float8; take int8)"):
        preflight(spec(model, path, device="cuda", **setting))
    if "quantization" in setting:
        with pytest.raises(Refused, match=r"the CPU multiplies no fp8: float8 needs a GPU of compute capability 8.9"):
            preflight(spec(model, path, device="cpu", **setting))
    else:  # a CPU stores float8 and multiplies it in other types
        preflight(spec(model, path, device="cpu", **setting))
