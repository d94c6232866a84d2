"""Every family against transformers, on small random models in which each switch of the config does something."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engines import EDGES, TINY, compare_logits, engine_of, tokens
from families import CASES, LONG, QUICK, RECURRENT, made
from fused_experts import FUSED, for_transformers

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.formats.scheme import weight_scheme
from batchinfer.models.config import FAMILIES
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize(("longest", "prompts"), [(64, EDGES[:4]), (512, EDGES[6:])])
def test_longrope_takes_the_factors_for_the_longest_row(
    make_model: Callable[..., Path], kind: str, longest: int, prompts: list[list[int]]
) -> None:
    """transformers takes those for the sequence at hand: each of these prompts is as long as the job allows."""
    model = make_model("phi3", pad_token_id=None, original_max_position_embeddings=64, rope_parameters=LONG)
    renamed = shutil.copytree(model, model.with_name(f"{model.name}-{kind}-{longest}"))
    raw = json.loads((model / "config.json").read_text())
    raw["rope_parameters"]["rope_type"] = kind
    (renamed / "config.json").write_text(json.dumps(raw))
    engine = engine_of(renamed, max_model_len=longest)
    assert largest_error(engine, model, prompts) <= 1e-4
    assert any("take its long factors" in note for note in engine.stats().notes) == (longest > 64)


def largest_error(engine: Engine, model: Path, prompts: list[list[int]]) -> float:
    """The largest difference from transformers' logits, as a share of the largest logit."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = list(compare_logits(engine, oracle, prompts))
    assert len(pairs) == 2 * len(prompts)
    ours, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
    return float((ours - expected).abs().max() / expected.abs().max())


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == FAMILIES.keys() == set(QUICK)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(
    make_model: Callable[..., Path], record_property: Callable[[str, float], None], case: str
) -> None:
    model = made(make_model, case)
    error = largest_error(engine_of(model), model, EDGES)
    record_property("largest_error", error)
    assert error <= 1e-4


@pytest.mark.parametrize("case", RECURRENT)
def test_what_no_gpu_has_kernels_for_is_refused(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], case: str
) -> None:
    with pytest.raises(ValueError, match="for which there is no kernel on a GPU yet: take --device cpu"):
        interpreted(made(make_model, case))


@pytest.mark.parametrize("case", [case for case in QUICK if case not in RECURRENT])
def test_a_gpus_kernels_compute_the_same(
    make_model: Callable[..., Path],
    interpreted: Callable[..., Engine],
    record_property: Callable[[str, float], None],
    case: str,
) -> None:
    """One prompt is shorter than a block; of the other, windows leave the first block behind."""
    model = made(make_model, case, **TINY | {"num_hidden_layers": 3})
    prompts = [np.random.default_rng(n).integers(2, 320, n).tolist() for n in (5, 42)]
    error = largest_error(interpreted(model), model, prompts)
    record_property("largest_error", error)
    assert error <= 1e-4


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.parametrize("quantization", ["none", "w8a8-int8"])
def test_a_row_is_the_same_alone_and_together(make_model: Callable[..., Path], case: str, quantization: str) -> None:
    """Compare rows whose common start is computed once with rows with drafts, and every other one with itself alone, in
    other chunks. Unrounded, they are the greedy texts of transformers."""
    model = made(make_model, case)
    prompts = [EDGES[5] + np.random.default_rng(n).integers(2, 320, 1 + 3 * n).tolist() for n in range(24)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    together = tokens(engine_of(model, quantization=quantization), requests)
    if quantization == "none":
        oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        for row, prompt in enumerate(prompts):
            assert together[row] == likeliest_behind(oracle, prompt, together[row]), f"row {row}"
    drafting = engine_of(model, quantization=quantization, speculation=Speculation("ngram", gate=False))
    assert tokens(drafting, requests) == together
    one_by_one = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "prefix_sharing": False}
    alone = tokens(engine_of(model, quantization=quantization, **one_by_one), requests.take(np.arange(0, 24, 2)))
    assert alone == {row: together[row] for row in range(0, 24, 2)}


@pytest.mark.parametrize("case", QUICK)
def test_eight_bits_lose_little(make_model: Callable[..., Path], case: str) -> None:
    """In mixtures every token takes all experts here: a rounded input might choose others, which is no small change."""
    model = made(make_model, case, **every_expert(case))
    rounded, exact = (first_logits(engine_of(model, quantization=kind)) for kind in ("w8a8-int8", "none"))
    # States sum up the errors of all tokens, and experts multiply them by gates of their own.
    most = 0.15 if case in ("qwen3_5_moe_text", "qwen3_next") else 0.1
    assert 0 < (rounded - exact).norm() < most * exact.norm()


def likeliest_behind(oracle: transformers.PreTrainedModel, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token behind the prompt, and behind each token of an answer but its last: the answer itself, if and
    only if it is the greedy one."""
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    likeliest: list[int] = logits.argmax(-1).tolist()
    return likeliest


def every_expert(case: str) -> dict[str, int]:
    """The fields with which each token takes all experts."""
    _, fields = CASES[case]
    counts = [fields.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")]
    experts = next(filter(None, counts), 0)
    if not experts:
        return {}
    groups = {"n_group": 1, "topk_group": 1} if "n_group" in fields else {}
    return {"moe_k" if "moe_k" in fields else "num_experts_per_tok": experts} | groups


def first_logits(engine: Engine) -> torch.Tensor:
    """The logits [prompts, V] of the first new token of each prompt."""
    engine.add(Requests.of(EDGES, SamplingParams(max_tokens=1, ignore_eos=True)))
    found = torch.zeros(len(EDGES), engine.runner.decoder.config.vocab_size)
    while (batch := engine.scheduler.schedule()) is not None:
        with torch.inference_mode():
            logits = engine.runner.decoder.forward(batch, engine.runner.caches)[: len(batch.sequences)]
        found[engine.table.row[batch.sequences]] = logits
        engine.scheduler.update(batch, logits.argmax(-1).numpy())
        for place in batch.sequences.tolist():
            engine.scheduler.finish(place)
    return found


@pytest.mark.parametrize("case", QUICK)
def test_transformers_reads_what_is_quantized(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    """To 4 bits, with calibration: both engines compute the same from it.

    transformers has no form of gpt-oss's or Granite's experts in few bits, so it gets the same weights expanded.
    """
    model, output = made(make_model, case), tmp_path / "out"
    sequences = [np.array(prompt, np.int32) for prompt in EDGES[4:10]]
    quantizer = Quantizer(model, output, weight_scheme("w4a16", 32), method("gptq"), sequences)
    reports = list(quantizer.run())
    errors = [error for report in reports for error in report.errors.values()]
    unread = "batchinfer reads experts in this form, and transformers does not"
    assert (unread in reports[0].notes) == (case in FUSED)
    quantizer.finish("# A card\n")
    assert 0 < max(errors) < 0.3
    oracle = for_transformers(case, output, tmp_path / "expanded")
    assert largest_error(engine_of(output, quantization="none"), oracle, EDGES[:6]) <= 1e-4
