"""The engine as it runs on a GPU, all but the recording of graphs: through Triton's interpreter, on the CPU.

The text of the model is the one that the CPU runs; transformers and the CPU's engine are the oracles. The interpreter
truncates where it rounds to bfloat16 and float8: models are in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import TINY, IdsAsText, compare_logits, engine_of, prompts_of, run, tokens

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import UNRECORDED, WAITING, Engine
from batchinfer.engine.output_lengths import LEAST_ENDED
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.quantize import CalibrationRows, quantize
from batchinfer.models.batch import Batch
from batchinfer.models.feed_forward_weights import FeedForwardWeights


def relative_error(engine: Engine, model: Path, lengths: tuple[int, ...]) -> float:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [np.random.default_rng(n).integers(2, 320, n).tolist() for n in lengths]
    pairs = list(compare_logits(engine, oracle, prompts))
    assert len(pairs) == 2 * len(lengths)
    ours, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 20}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
        ("qwen3", {"num_key_value_heads": 2}),
    ],
)
def test_logits_are_those_of_transformers(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], family: str, overrides: dict[str, Any]
) -> None:
    model = make_model(family, **{**TINY, **overrides})
    assert relative_error(interpreted(model), model, (1, 33, 65)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "kernel", "bound"),
    [
        ({"deterministic": True}, ("linear", "triton, one tile"), 1e-5),
        ({"quantization": "w8a8-int8"}, ("linear_w8a8 (int8)", "triton"), 0.03),
        ({"quantization": "w8a8-int8+head"}, ("linear_w8a8 (int8)", "triton"), 0.03),
        ({"quantization": "w8a8-fp8"}, ("linear_w8a8 (fp8)", "triton"), 0.15),
        ({"kv_cache_dtype": "int8"}, ("linear", "torch"), 0.02),
        ({"kv_cache_dtype": "fp8"}, ("linear", "torch"), 0.1),
    ],
)
def test_fewer_bits_stay_near(
    make_model: Callable[..., Path],
    interpreted: Callable[..., Engine],
    settings: dict[str, Any],
    kernel: tuple[str, str],
    bound: float,
) -> None:
    model = make_model("llama", **TINY)
    engine = interpreted(model, **settings)
    error = relative_error(engine, model, (1, 40))
    assert 0 < error < bound
    assert engine.stats().kernels[kernel[0]] == kernel[1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_are_those_of_the_cpu_with_steps_replayed_and_sequences_that_end_unforeseen(
    make_model: Callable[..., Path],
    interpreted: Callable[..., Engine],
    temperature: float,
) -> None:
    """Places are taken again while a step computes their last owner's next token in vain."""
    model = make_model("llama", **TINY)
    prompts = prompts_of(7, 8)
    free = SamplingParams(max_tokens=11, ignore_eos=True, temperature=temperature, top_p=0.95)
    seeds = range(7, 14)
    everything = tokens(engine_of(model), Requests.of(prompts, free, seeds=seeds))
    eos = (everything[0][2], everything[4][4])
    stop = "".join(chr(256 + t) for t in everything[5][3:5])
    params = SamplingParams(max_tokens=11, temperature=temperature, top_p=0.95, stop=(stop,))
    requests = Requests.of(prompts, params, seeds=seeds)
    engine = interpreted(model, IdsAsText(eos_ids=eos))
    found = run(engine, requests)
    assert found == run(engine_of(model, IdsAsText(eos_ids=eos)), requests)
    assert {reason for _, reason in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert engine.runner.steps.replays > 3 and len(engine.runner.steps.recordings) > 1


def test_a_row_that_is_not_finite_spoils_no_other(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine]
) -> None:
    model = make_model("llama", **TINY)
    prompts = [[t if t != 7 else 8 for t in prompt] for prompt in prompts_of(5, 30)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    clean = run(engine_of(model), Requests.of(prompts, params))
    prompts[1][0] = 7
    engine = interpreted(model, max_num_seqs=2)
    engine.runner.decoder.embedding[7] = float("nan")
    found = run(engine, Requests.of(prompts, params))
    assert found[1] == ([], FinishReason.ERROR)
    spared = [row for row in (0, 2, 3, 4) if 7 not in clean[row][0]]
    assert len(spared) > 2 and all(found[row] == clean[row] for row in spared)


@pytest.mark.usefixtures("fixed_products")
@pytest.mark.parametrize("quantization", ["none", "w8a8-fp8"])
def test_deterministic_rows_have_the_same_bits_in_any_batch(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], quantization: str
) -> None:
    model = make_model("mistral", **TINY, sliding_window=40)
    prompts = [np.random.default_rng(n).integers(2, 320, n).tolist() for n in (3, 70, 20)]

    def logits(**settings: Any) -> dict[int, list[bytes]]:
        engine = interpreted(model, deterministic=True, quantization=quantization, **settings)
        engine.add(Requests.of(prompts, SamplingParams(max_tokens=2, ignore_eos=True)))
        found: dict[int, list[bytes]] = {row: [] for row in range(len(prompts))}
        while (batch := engine.scheduler.schedule()) is not None:
            rows = engine.runner.logits(batch)[: len(batch.sequences)]
            for row, bits in zip(engine.table.row[batch.sequences].tolist(), rows.numpy(), strict=True):
                found[row].append(bits.tobytes())
            engine.scheduler.update(batch, rows.argmax(-1).numpy())
            for place in batch.sequences.tolist():
                if engine.table.length[place] == engine.table.end[place]:
                    engine.scheduler.finish(place)
        return found

    together = logits(max_num_seqs=4, max_num_batched_tokens=512)
    assert logits(max_num_seqs=1, max_num_batched_tokens=64) == together


@pytest.mark.parametrize(
    ("scheme", "group_size", "note", "kernel"),
    [
        ("w4a16", 32, "its matrices stay in 4 bits, for the GPU's kernel", "linear_w4a16"),
        ("w4a16", 0, "its matrices stay in 4 bits, for the GPU's kernel", "linear_w4a16"),
        ("w8a8-int8", None, "8-bit products", "linear_w8a8 (int8)"),
        ("w8a8-fp8", None, "8-bit products", "linear_w8a8 (fp8)"),
    ],
)
def test_checkpoints_in_few_bits_are_multiplied_as_they_are_stored(
    make_model: Callable[..., Path],
    interpreted: Callable[..., Engine],
    tmp_path: Path,
    scheme: str,
    group_size: int | None,
    note: str,
    kernel: str,
) -> None:
    """4-bit weights beside the CPU's engine, which expands them; 8 bits beside the model that they were made from."""
    model, quantized = make_model("llama", **TINY), tmp_path / "quantized"
    quantize(str(model), None, quantized, scheme, "rtn", group_size, CalibrationRows())
    engine = interpreted(quantized)
    requests = Requests.of(prompts_of(4, 40), SamplingParams(max_tokens=4, ignore_eos=True))
    if scheme == "w4a16":
        assert tokens(engine, requests) == tokens(engine_of(quantized), requests)
    else:
        assert relative_error(engine, model, (1, 40)) < 0.15
    assert [note in text for text in engine.stats().notes] == [True]
    assert engine.stats().kernels[kernel] == "triton"


def test_a_shape_alone_is_run_with_noise_in_as_many_bits_as_it_says(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], tmp_path: Path
) -> None:
    quantize(str(make_model("llama", **TINY)), None, tmp_path / "q", "w4a16", "rtn", 32, CalibrationRows())
    (tmp_path / "shape").mkdir()
    (tmp_path / "q" / "config.json").rename(tmp_path / "shape" / "config.json")
    engine = interpreted(tmp_path / "shape", random_weights=True)
    new = tokens(engine, Requests.of(prompts_of(3, 40), SamplingParams(max_tokens=3, ignore_eos=True)))
    assert all(len(ids) == 3 for ids in new.values())
    assert "linear_w4a16" in engine.stats().kernels

    blocks = [layer.feed_forward for layer in engine.runner.decoder.layers]
    assert all(isinstance(b, FeedForwardWeights) and b.down.nbytes < b.down.operations_per_row for b in blocks)


@pytest.mark.long(minutes=1)
def test_shared_prefixes_and_preempted_rows_come_out_the_same(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine]
) -> None:
    model = make_model("llama", **TINY)
    template = np.random.default_rng(0).integers(2, 320, 64).tolist()
    prompts = [[*template, 5, k] for k in range(2, 5)] + [[7, 8], [9], [10, 11, 12]]
    requests = Requests.of(prompts, SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True), seeds=range(6))
    expected = tokens(engine_of(model, max_model_len=128, max_num_batched_tokens=64, max_num_seqs=4), requests)
    engine = interpreted(model, kv_cache_tokens=128)
    assert engine.scheduler.admission.lengths is not None
    for _ in range(LEAST_ENDED):
        engine.scheduler.admission.lengths.observe(-1, 2)
    assert tokens(engine, requests) == expected
    assert engine.stats().shared_tokens == 2 * 64 and engine.stats().preemptions > 0


READING = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "no_repeat_ngram_size": 2, "min_tokens": 3}
BY_POSITION = {"suppress_tokens": range(100, 200), "begin_suppress_tokens": range(60), "min_tokens": 3}


@pytest.mark.parametrize(("options", "method"), [(READING, "off"), (READING, "ngram"), (BY_POSITION, "off")])
def test_penalties_and_bans_are_those_of_the_cpu(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], options: dict[str, Any], method: str
) -> None:
    """A step that looks at a row's tokens waits for the step before it; one that bans by position alone does not."""
    model = make_model("llama", **TINY)
    prompts = [*prompts_of(1, 30), [7, 8, 9] * 5, [7, 8, 9] * 5]
    requests = Requests.of(prompts, SamplingParams(max_tokens=6, **options))
    expected = run(engine_of(model, speculation=Speculation("off")), requests)
    assert expected != run(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=6)))
    engine = interpreted(model, speculation=Speculation(method, gate=False))
    assert run(engine, requests) == expected
    assert engine.stats().kernels["penalties and bans"] == "torch"
    assert engine.stats().notes == [UNRECORDED, *([WAITING] if options is READING else [])]


def test_drafts_are_verified_in_replayed_steps(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine]
) -> None:
    """All drafts are verified, right ones and wrong ones, so that rows have different numbers of tokens."""
    model = make_model("llama", **TINY)
    requests = Requests.of(prompts_of(3, 30), SamplingParams(max_tokens=8, ignore_eos=True))
    expected = run(engine_of(model, speculation=Speculation("off")), requests)
    engine = interpreted(
        model, speculation=Speculation("suffix", num_speculative_tokens=3, prompt_lookup_min=1, gate=False)
    )
    for _ in range(2):  # the second time, answers are found in those of the first
        assert run(engine, requests) == expected
    stats = engine.stats()
    assert 0 < stats.accepted < stats.drafted
    assert stats.replayed_steps > 0 and stats.recorded_steps > 0 and stats.launched_steps == 0
    assert stats.steps > stats.replayed_steps + stats.recorded_steps, "those with prompts are not among them"


def test_deterministic_steps_have_the_same_bits_recorded_and_not(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mistral", **TINY, sliding_window=20)
    requests = Requests.of([[5, 6], [7] * 25], SamplingParams(max_tokens=4, temperature=0.8, ignore_eos=True))

    def bits(recording: bool) -> tuple[dict[int, Any], dict[tuple[int, int], bytes]]:
        """The tokens, and the bits of each row's logits by place and position."""
        engine, found = interpreted(model, deterministic=True), {}
        engine.runner.steps.recording = recording
        forward = engine.runner.decoder.forward

        def watched(batch: Batch, caches: Any) -> torch.Tensor:
            logits = forward(batch, caches)
            positions = batch.positions[batch.sampled].tolist()
            for place, position, row in zip(batch.places.tolist(), positions, logits.numpy(), strict=False):
                if place >= 0:
                    found[place, position] = row.tobytes()
            return logits

        monkeypatch.setattr(engine.runner.decoder, "forward", watched)
        new = run(engine, requests)
        assert (engine.runner.steps.replays > 0) == recording
        return new, found

    assert bits(True) == bits(False)
