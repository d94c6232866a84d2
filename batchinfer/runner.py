"""`ModelRunner`: a `Batch` to sampled tokens, on one device."""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer import gguf
from batchinfer.batch import Batch
from batchinfer.config import EngineConfig
from batchinfer.four_bits import FourBitPath
from batchinfer.gguf_weights import GGUFWeights
from batchinfer.kernels.kv_cache import KV_DTYPES
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import greedy, sample
from batchinfer.model import Decoder
from batchinfer.model_config import ModelConfig
from batchinfer.quantize.rtn import quantize_channels
from batchinfer.quantize.scheme import QuantScheme, scheme
from batchinfer.weights import RandomWeights, SafetensorsWeights, WeightSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """Weights and the pool of keys and values; `run(batch)` is one step.

    A `ValueError` names what cannot be: an unknown type or scheme, a checkpoint that does not fit its config.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        if config.device != "cpu":
            raise ValueError(f"device is {config.device!r}; this version runs on: cpu")
        form = None if config.random_weights else model.form
        self.scheme: QuantScheme = scheme(config.quantization, form is not None and form.integer_inputs)
        self.dtype = _dtype(config.dtype, model.dtype)
        weights = _weights(config, model, self.dtype)
        path = FourBitPath.choose(config, self.scheme, self.dtype)
        self.decoder = Decoder(model, self.scheme, self.dtype, weights, path.packed)
        self.kv_dtype = _kv_dtype(config.kv_cache_dtype, self.decoder.stream)
        self.notes: list[str] = []
        if weights.stored_as is not None:
            held = _held(self.scheme, self.dtype, path if self.decoder.four_bits else None)
            self.notes.append(f"the checkpoint is {weights.stored_as}: {held}")
        if self.decoder.unpacked:
            count, first = len(self.decoder.unpacked), self.decoder.unpacked[0]
            self.notes.append(
                f"int4pack does not take {count} of the products, which are expanded: the first is {first}"
            )

    def allocate(self, blocks: int, block_size: int) -> None:
        """Make the pool, of `blocks` blocks for all layers."""
        self.caches = self.decoder.caches(blocks, block_size, self.kv_dtype)

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(token ids [r], finite [r]) for the step's sampled sequences."""
        logits = self.decoder.forward(batch, self.caches)[: len(batch.sequences)]
        tokens, finite = greedy(logits) if batch.sampling is None else sample(logits, batch.sampling)
        return tokens.numpy(), finite.numpy()

    def clear_blocks(self, blocks: NDArray[np.int64]) -> None:
        """Wipe blocks that hold values that are not finite."""
        for cache in self.caches:
            cache.clear(torch.from_numpy(blocks))

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the pool; pages that were never written take no memory."""
        return sum(cache.nbytes for cache in self.caches)


def _weights(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> WeightSource:
    if config.random_weights:
        return RandomWeights(dtype)
    if (config.model / gguf.WEIGHTS).exists():
        return GGUFWeights(config.model / gguf.WEIGHTS, model)
    return SafetensorsWeights(config.model, model.form)


def _held(scheme: QuantScheme, dtype: torch.dtype, path: FourBitPath | None) -> str:
    """What becomes of weights in a checkpoint's format; `path` is that of weight-only 4-bit matrices, if there are."""
    if scheme.as_stored:
        return "8-bit products"
    if scheme.quantized:
        return "its matrices are rounded to 8 bits by channel at load"
    if path is not None and path.packed:
        return f"its matrices stay in 4 bits, for int4pack: {path.reason}"
    expanded = f"its matrices are expanded to {str(dtype).removeprefix('torch.')} at load"
    return expanded if path is None else f"{expanded}: {path.reason}"


def bytes_per_token(model: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Of keys and values in all layers."""
    scale = 4 if kv_dtype == torch.int8 else 0
    return 2 * model.layers * model.kv_heads * (model.head_dim * kv_dtype.itemsize + scale)


@torch.inference_mode()
def measure_peak(scheme: QuantScheme, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of the scheme's own matrix product at 512 x 4096 x 2048, the best of some repeats."""
    weight = torch.randn(4096, 2048)
    x = torch.randn(512, 2048)
    if scheme.quantized:
        product = LinearW8A8(*quantize_channels(weight))
        values = Rows(torch.randint(1, 256, x.shape, dtype=torch.uint8), torch.ones(512, 1))

        def once() -> Tensor:
            return product(values).values
    else:
        weight, x = weight.to(dtype), x.to(dtype)

        def once() -> Tensor:
            return torch.nn.functional.linear(x, weight)

    once()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - started)
    return 2 * x.shape[0] * weight.numel() / best


def _dtype(asked: str, checkpoint: str) -> torch.dtype:
    name = checkpoint if asked == "auto" else asked
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of auto, {', '.join(DTYPES)}")
    # CPUs have no float16 arithmetic; its checkpoints hold nothing that float32 cannot.
    return torch.float32 if asked == "auto" and name == "float16" else DTYPES[name]


def _kv_dtype(asked: str, computed: torch.dtype) -> torch.dtype:
    if asked == "auto":
        return computed  # as they are computed: nothing is lost, and nothing converted at each step
    if asked not in KV_DTYPES:
        raise ValueError(f"kv_cache_dtype is {asked!r}; it must be one of auto, {', '.join(KV_DTYPES)}")
    return KV_DTYPES[asked]
