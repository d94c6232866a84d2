"""`ModelRunner`: computes a `Batch` on one device and samples its new tokens."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.engine.attention_inputs import AttentionInputs, RaggedInputs, TiledInputs, WindowedInputs
from batchinfer.engine.check_settings import check_types
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.cuda_graphs import CudaGraphs, Found, most_recorded
from batchinfer.engine.four_bit_path import FourBitPath
from batchinfer.engine.pool_size import bytes_per_token
from batchinfer.engine.transfer import Sampled
from batchinfer.formats.scheme import QuantScheme, scheme
from batchinfer.kernels.attention_plan import AttentionPlan
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.backends import choose_backend
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path, why_reference
from batchinfer.kernels.grain import MIN_ROWS, TILE, padded_logits
from batchinfer.kernels.kv_cache import KV_DTYPES, KVCache
from batchinfer.kernels.logits import change_logits
from batchinfer.kernels.processor import bits_are_kept
from batchinfer.kernels.scores import ScoredTokens, StepScores, log_probabilities, with_likeliest
from batchinfer.kernels.state_pool import StatePool
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig
from batchinfer.models.gguf_folder import weight_files
from batchinfer.models.gguf_weights import GGUFWeights
from batchinfer.models.loader import Loaded, load_decoder
from batchinfer.models.prompt_scores import known_log_probabilities
from batchinfer.models.recurrent import state_shape
from batchinfer.models.weights import RandomWeights, SafetensorsWeights, WeightSource, with_stored_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BITS_NOT_KEPT = (
    "MKL is not in its strict mode, so that a row's bits may depend on the rows beside it: start Python with "
    "MKL_CBWR=AUTO,STRICT to keep them"
)

ONE_THREAD = (
    "the kernels in C compute on one thread, because torch's OpenMP library has no GOMP_parallel; --cpu-path reference "
    "computes on all"
)


class ModelRunner:
    """Holds the weights and the KV cache; `launch(batch)` computes one step.

    On a GPU the next step may start before the host knows a step's new tokens, because they stay on the device too.
    `late` is the number of steps that may be under way like this. Raises `ValueError` naming an unknown type or scheme,
    or what in a checkpoint does not fit its config.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.backend = choose_backend(config.device, config.deterministic, config.cpu_path)
        if not isinstance(self.backend, CpuBackend):
            model.refuse_on_gpu()
        made_for = frozenset[str]() if model.form is None else model.form.eight_bit_inputs
        self.scheme: QuantScheme = scheme(config.quantization, bool(made_for & self.backend.eight_bits))
        check_types(config, self.backend.eight_bits)
        self.dtype = _dtype(config, model.dtype, self.backend)
        weights, model = _weights(config, model, self.dtype, self.backend.device)
        model = model.within(config.max_model_len)
        path = FourBitPath.choose(config, self.scheme, self.dtype, self.backend)
        loaded = load_decoder(model, self.scheme, self.dtype, weights, self.backend, path.packed)
        self.decoder = loaded.decoder
        self.kv_dtype = _kv_dtype(config, self.decoder.stream)
        by_token = isinstance(self.backend, CompiledBackend) and not self.decoder.config.recurrent
        if config.prefix_grain != TILE and not by_token:
            raise ValueError(f"prefix_grain is {config.prefix_grain}; without kernels in C it must be {TILE}")
        self.notes = list(model.notes)
        if isinstance(self.backend, CpuBackend) and not bits_are_kept():
            self.notes.append(BITS_NOT_KEPT)
        if isinstance(self.backend, CompiledBackend) and self.backend.threads < torch.get_num_threads():
            self.notes.append(ONE_THREAD)
        if isinstance(self.backend, CpuBackend) and cpu_path() == REFERENCE:
            self.notes.append(f"the CPU computes by torch alone, which is slower: {why_reference()}")
        if weights.stored_as is not None:
            held = _held(self.scheme, self.dtype, path if loaded.four_bits else None, loaded)
            self.notes.append(f"the checkpoint is {weights.stored_as}: {held}{loaded.inputs.words}")
        if loaded.unpacked:
            self.notes.append(
                f"the 4-bit kernel does not take {len(loaded.unpacked)} of the products, which are expanded: the first "
                f"is {loaded.unpacked[0]}"
            )
        self.late = 0
        if not isinstance(self.backend, CpuBackend):
            self.late = 1
            self.newest = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=self.backend.device)
            self.steps = CudaGraphs(self._compute, self.backend.device, most_recorded(config), self.notes)

    @property
    def logits_grain(self) -> int:
        """The number of which a step's rows of logits must be a multiple: the last layer and the head compute them."""
        return MIN_ROWS if self.late else max(self.decoder.row_grain, self.decoder.head.row_grain)

    @property
    def attention_inputs(self) -> AttentionInputs:
        """The builder of a step's inputs to attention, for the scheduler."""
        shapes = self.decoder.config.attention_shapes
        if isinstance(self.backend, CompiledBackend):
            return WindowedInputs(shapes)
        if isinstance(self.backend, CpuBackend):
            return TiledInputs(shapes)
        from batchinfer.kernels.attention_triton import tiling
        from batchinfer.kernels.backend_triton import TritonBackend

        assert isinstance(self.backend, TritonBackend)
        processors = None if self.backend.deterministic else self.backend.gpu.processors
        types = self.decoder.stream, self.kv_dtype, self.backend.gpu
        tilings = {shape: tiling(shape.head_dim, shape.heads // shape.kv_heads, *types) for shape in shapes}
        return RaggedInputs(tilings, processors)

    @property
    def row_steps(self) -> tuple[int, ...]:
        """Numbers of rows up to which one kernel of the matrix products serves; () on the CPU, which compiles none."""
        if isinstance(self.backend, CpuBackend):
            return ()
        from batchinfer.kernels.products_triton import row_steps

        return row_steps()

    @property
    def device_name(self) -> str:
        """The name of the device in the report."""
        if self.backend.device.type == "cuda":
            return torch.cuda.get_device_name(self.backend.device)
        return f"cpu, {torch.get_num_threads()} threads"

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return bytes_per_token(self.decoder.config, self.kv_dtype)

    def kv_bytes_read(self, batch: Batch) -> tuple[int, int]:
        """Return the bytes of keys and values that a step's attention reads: (with shared prefixes, without them).

        The CPU's attention does not count what it reads: (0, 0).
        """
        read = unshared = 0
        for attention in self.decoder.config.attentions:
            plan, a_key = batch.attention[attention.shape], attention.kv_bytes(self.kv_dtype.itemsize)
            if isinstance(plan, AttentionPlan):
                read += a_key * plan.keys_read
                unshared += a_key * plan.keys_unshared
        return read, unshared

    @property
    def experts_touched(self) -> tuple[int, int]:
        """The mixtures of experts that were computed, and the experts touched in them; (0, 0) on a GPU: not counted."""
        backend = self.backend
        return (backend.expert_layers, backend.experts_touched) if isinstance(backend, CpuBackend) else (0, 0)

    @property
    def peak_device_bytes(self) -> int:
        """Most bytes of a GPU's memory taken so far, weights and KV cache included; 0 on the CPU."""
        return torch.cuda.max_memory_reserved() if self.backend.device.type == "cuda" else 0

    @cached_property
    def bytes_per_state(self) -> int:
        """Bytes of a sequence's state in all layers; 0 if the model has none."""
        return sum(state_shape(mixer).nbytes(self.decoder.stream) for mixer in self.decoder.config.recurrent)

    def allocate(self, blocks: int, block_size: int, states: int = 0) -> None:
        """Allocate in each layer `blocks` blocks of `block_size` tokens of the KV cache, or `states` states."""
        self.caches = self.decoder.caches(blocks, block_size, self.kv_dtype, states)

    @property
    def kv_caches(self) -> list[KVCache]:
        """The caches of layers with attention, each once: layers may share one."""
        return list(dict.fromkeys(cache for cache in self.caches if isinstance(cache, KVCache)))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Sampled:
        """Start a step; `wait()` on the result returns what it sampled."""
        if batch.changes is not None:
            batch = replace(batch, changes=batch.changes.within(self.decoder.config.vocab_size))
            self.backend.kernels["penalties and bans"] = "torch"
        if not self.late:
            return Sampled.fetch(*self._sample(batch))
        return Sampled.fetch(*self.steps.run(batch))

    def _compute(self, batch: Batch) -> Found:
        """Compute a step on the device; tokens that only the device knows are filled in there."""
        if len(rows := batch.late_rows):
            known = batch.late_places < 0  # in a recorded step, which has all rows here
            batch.tokens[rows] = torch.where(known, batch.tokens[rows], self.newest[batch.late_places])
        tokens, finite, scores = self._sample(batch)
        self.newest[batch.places] = tokens
        return tokens, finite, scores

    def _sample(self, batch: Batch) -> Found:
        """Compute a step, and choose its tokens."""
        logits, scores = self._logits(batch)
        if len(batch.copies):
            for kv in self.kv_caches:
                kv.copy(batch.copied, batch.copies)
        if batch.states is not None and len(batch.states.copies):
            for cache in self.caches:
                if isinstance(cache, StatePool):
                    cache.copy(batch.states.copied, batch.states.copies)
        scoring = batch.scoring
        own = None if scoring is None or not len(scoring.sampled) else logits[scoring.sampled_rows]
        if batch.changes is not None:
            change_logits(logits, batch.changes)
        if batch.allowed is not None:  # after the forward pass is launched: a GPU computes meanwhile
            self.backend.allow(logits, batch.allowed())
        tokens, finite = self.backend.sample(logits, batch.sampling)
        if scoring is not None and own is not None:
            chosen = ScoredTokens(torch.arange(len(own), device=own.device), tokens[scoring.sampled_rows])
            scores = replace(scores, sampled=with_likeliest(own, chosen, min(scoring.likeliest, own.shape[1])))
        return tokens, finite, scores

    def _logits(self, batch: Batch) -> tuple[Tensor, StepScores]:
        """Compute a step but the choice of tokens: return the logits [r, V] that these are sampled from, and the
        log-probabilities of labels and of tokens of prompts."""
        x, y = self.decoder.hidden(batch, self.caches)
        first, scores = padded_logits(batch.first_rows, batch.logits_grain), StepScores()
        if batch.scoring is not None and len(batch.scoring.rows):
            known = known_log_probabilities(self.decoder, x[first:], y.between(first), batch.scoring)
            x, y, scores = x[:first], y.between(0, first), StepScores(known=known)
        logits = self.decoder.logits(x, y)
        if batch.labels is not None:
            found = log_probabilities(logits[len(batch.places) : batch.first_rows], batch.labels.scored)
            scores = replace(scores, labels=found)
        return logits[: len(batch.places)], scores

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of a step whose tokens the host knows: float32 [S, V], on the device."""
        return self.decoder.forward(self.steps.transfer.send(batch) if self.late else batch, self.caches)

    def clear_blocks(self, blocks: NDArray[np.int64]) -> None:
        """Zero `blocks` of the KV cache, which hold values that are not finite."""
        on_device = torch.from_numpy(blocks).to(self.backend.device)
        for kv in self.kv_caches:
            kv.clear(on_device)

    def clear_slots(self, slots: NDArray[np.int64]) -> None:
        """Zero `slots` of the KV cache, which hold values that are not finite."""
        on_device = torch.from_numpy(slots).to(self.backend.device)
        for kv in self.kv_caches:
            kv.clear_slots(on_device)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache and of states. On the CPU, pages that were never written take no memory."""
        return sum(cache.nbytes for cache in dict.fromkeys(self.caches))


def _weights(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[WeightSource, ModelConfig]:
    """Return where weights are read, and the model as it is stored there."""
    if config.random_weights:
        return RandomWeights(dtype, device, model.form), model
    if files := weight_files(config.model):
        stored = GGUFWeights(files, model)
        return stored, stored.model
    weights = SafetensorsWeights(config.model, model)
    return weights, with_stored_head(model, weights)


def _held(scheme: QuantScheme, dtype: torch.dtype, path: FourBitPath | None, loaded: Loaded) -> str:
    """Say for the report how quantized weights are held.

    `path` is that of the weight-only 4-bit matrices, None if there are none.
    """
    if loaded.kept:
        return "its matrices stay in 4 bits, for 8-bit inputs"
    if scheme.as_stored and loaded.inputs.eight_bits:
        return "8-bit products"
    if scheme.quantized and not scheme.as_stored:
        return "its matrices are rounded to 8 bits by channel at load"
    if path is not None and path.packed:
        return f"its matrices stay in 4 bits, {path.reason}"
    expanded = f"its matrices are expanded to {str(dtype).removeprefix('torch.')} at load"
    return expanded if path is None else f"{expanded}: {path.reason}"


@torch.inference_mode()
def _dtype(config: EngineConfig, stored: str, backend: Backend) -> torch.dtype:
    name = config.computed_in(stored, has_float16=not isinstance(backend, CpuBackend))
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _kv_dtype(config: EngineConfig, computed: torch.dtype) -> torch.dtype:
    name = config.cached_in(str(computed).removeprefix("torch."))
    if name not in KV_DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}; it must be one of auto, {', '.join(KV_DTYPES)}")
    return KV_DTYPES[name]
