"""Tiny models of each family, made by transformers, and the plumbing to run them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchinfer.host.own_process import own_process

# A worker has a core of its own: torch takes as many threads as it sees cores, and threads of two workers on one core
# wait for each other at every barrier.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Triton reads it when it is imported, by whichever test is first: its kernels run in the interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests compare bits.
own_process()

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, `long(minutes=...)`: none of them is left to one worker at the end."""
    marks = {item: item.get_closest_marker("long") for item in items}
    items.sort(key=lambda item: -mark.kwargs.get("minutes", 0) if (mark := marks[item]) else 0)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test that fails once in a hundred runs tells nobody anything."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a user has measured on this machine changes no test, and no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `make(model, tokenizer=None, **settings) -> Engine`: with a GPU's kernels, in Triton's interpreter."""
    from engines import engine_of

    small = {"max_model_len": 128, "max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_tokens": 1024}

    def make(model: Path, tokenizer: Any = None, **settings: Any) -> Any:
        with monkeypatch.context() as inside:
            inside.setenv("BATCHINFER_KERNELS", "triton")
            engine = engine_of(model, tokenizer, **{**small, **settings})
        assert engine.runner.late == 1
        return engine

    return make


@pytest.fixture
def fixed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a row of a product have the same bits wherever it lies in the tile, in Triton's interpreter.

    The interpreter multiplies by NumPy's BLAS, which does not promise that: OpenBLAS breaks it on processors with AVX2
    and no AVX-512. A GPU's matrix units keep it.
    """
    import numpy as np
    from triton.runtime import interpreter

    class FixedOrder:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def matmul(x: Any, y: Any, dtype: Any) -> Any:
            return np.einsum("mk,kn->mn", x.astype(dtype), y.astype(dtype))

    monkeypatch.setattr(interpreter, "np", FixedOrder())


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(family, dtype="float32", **config) -> folder`: random weights, saved by transformers."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(family: str, dtype: str = "float32", **overrides: Any) -> Path:
        key = repr((family, dtype, sorted(overrides.items())))
        if key not in made:
            config = transformers.AutoConfig.for_model(family, **{**SHAPE, **overrides})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
            for name, tensor in (dict(model.named_parameters()) | buffers).items():
                # Biases and norms start as constants; give every tensor something to be wrong about. Larger weights
                # than usual, so that logits differ by more than rounding. States decay slowly, so that the first
                # tokens of a prompt still matter behind the last.
                around_one = "norm" in name or name.endswith("layer_scalar")
                mean = 1.0 if around_one else -5.0 if name.endswith("dt_bias") else 0.0
                torch.nn.init.normal_(tensor, mean, 0.1)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
