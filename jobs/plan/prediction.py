"""Predicting how long a job will take, from its prompt lengths, the model's shape and the measured device.

Unless end-of-text is ignored, output lengths are unknown before a run. The central estimate draws them from the usual
lengths of answers (`USUAL`, `DEVIATION`). The range goes from a tenth of the tokens that each row may have to all of
them. The prediction assumes that rows run longest prompt first, in one window, and never wait for memory. It also
assumes that weights in 4 bits are expanded, and that the job's other process takes no time from the cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from batchinfer.cost.simulate_steps import Steps, simulate
from batchinfer.cost.step_cost import PRODUCTS, DeviceCost, Floats, Weights, Work, layer_weights, quantities
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path
from batchinfer.kernels.grain import MIN_ROWS, padded_size
from batchinfer.kernels.ragged import Ints
from batchinfer.models.config import read_shape, stored_dtype
from batchinfer.models.hub import read_config

SAMPLE_ROWS = 2048
PROMPT_STEPS = 4_000  # most steps to simulate; with very long prompts or answers the sample has fewer rows
DECODING_STEPS = 100_000
DRAFTS = 4  # drafts for each row in a step, when deciding whether drafts pay
USUAL, DEVIATION = 322.0, 244.0
"""Mean and standard deviation of the lengths of answers that may end by themselves, taken to be lognormal. They are
those of ShareGPT's answers, as used by Kwon et al. 2023."""
LEAST_SHARE = 0.1  # share of the tokens that a row may have, for the low end of the range
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class JobShape:
    """The properties of a job that its time depends on, beside model and device."""

    lengths: Ints  # [longest prompt + 1] number of computed prompts by length
    sampling: SamplingParams
    max_model_len: int
    shared_tokens: int = 0  # prompt tokens that are computed once for several rows

    @classmethod
    def of(cls, figures: LengthFigures, sampling: SamplingParams, max_model_len: int, by_row: bool) -> "JobShape":
        """Return the shape of a job from the figures of all its rows. If they have sampling params of their own,
        `by_row`, they are taken to have the mean of their `max_tokens` each."""
        if by_row:
            mean = -(-figures.new_tokens // max(int(figures.run_lengths.sum()), 1))
            sampling = replace(sampling, max_tokens=max(mean, 1))
        shared = figures.shared_tokens + figures.sample_tokens  # further samples share the first one's prompt
        return cls(figures.run_lengths, sampling, max_model_len, shared)

    @property
    def rows(self) -> int:
        """Number of rows that are computed."""
        return int(self.lengths.sum())

    def sample(self, config: EngineConfig) -> Ints:
        """Return the prompt lengths of all rows or of a sample of the rows [n], longest first."""
        prompt = max(int(self.lengths @ np.arange(len(self.lengths))) / max(self.rows, 1), 1)
        answer = min(self.sampling.max_tokens, self.max_model_len)
        most = min(
            SAMPLE_ROWS,
            int(PROMPT_STEPS * config.max_num_batched_tokens / prompt),
            DECODING_STEPS * config.max_num_seqs // answer,
        )
        return _quantiles(self.lengths, _even(min(self.rows, max(most, 4 * config.max_num_seqs))))[::-1]

    def most_tokens(self, prompts: Ints) -> Ints:
        """Return the most new tokens that rows with these prompt lengths may have."""
        return np.minimum(self.sampling.max_tokens, self.max_model_len - prompts)

    @property
    def short_of_context(self) -> int:
        """Number of rows that may have fewer tokens than `max_tokens`, because prompt and answer fill the context."""
        return int(self.lengths[max(self.max_model_len - self.sampling.max_tokens + 1, 0) :].sum())

    @property
    def share_cut(self) -> float:
        """Share of the rows whose answers would be cut at the most tokens that they may have, if answers had their
        usual lengths."""
        lengths = np.flatnonzero(self.lengths)
        usual = _usual_logarithms()
        cut = [1 - usual.cdf(float(np.log(most))) for most in np.maximum(self.most_tokens(lengths), 1)]
        return float(np.average(cut, weights=self.lengths[lengths])) if len(lengths) else 0.0


@dataclass(frozen=True)
class Setting:
    """A way to run a model: the kind of matrix products (a name in `PRODUCTS`), and the type of keys and values."""

    products: str
    kv_cache: str

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number of the residual stream, on a CPU: of a quantized model it is float32."""
        return 2 if self.products in ("bfloat16", "float16") else 4

    @classmethod
    def of(cls, config: EngineConfig) -> "Setting":
        """Return the setting that the engine resolves from this config. Raises `Refused` for a model without
        config.json."""
        raw = read_config(config.model)
        dtype = config.computed_in(stored_dtype(raw), has_float16=config.device != "cpu")
        scheme = config.quantization.removesuffix("+head")
        quantized = raw.get("quantization_config")
        if scheme == "auto" and _made_for_8_bit_inputs(quantized):
            products = "w4a8" if weight_bits(quantized) == 4 else "w8a8-int8"
        else:
            products = dtype if scheme in ("auto", "none") else scheme
        computed = PRODUCTS[products].kv_cache(config.device) if products in PRODUCTS else "auto"
        return cls(products, config.cached_in(computed))


def _groups(quantization: object) -> list[Mapping[str, Any]]:
    """Return the groups of a checkpoint's `quantization_config` in the format of compressed-tensors, if it is in it."""
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    return [group for group in (groups.values() if isinstance(groups, Mapping) else ()) if isinstance(group, Mapping)]


def weight_bits(quantization: object) -> int:
    """Return the bits of a checkpoint's weights, according to its `quantization_config`: 0 if they are in floating
    point, differ, or are not told."""
    weights = [group.get("weights") for group in _groups(quantization)]
    bits = {w.get("num_bits") for w in weights if isinstance(w, Mapping)}
    if isinstance(quantization, Mapping) and not bits:
        bits = {quantization.get("bits")}  # as GPTQ, AWQ and AutoRound write it
    (found,) = bits if len(bits) == 1 else (0,)
    return found if isinstance(found, int) else 0


def _made_for_8_bit_inputs(quantization: object) -> bool:
    """Return whether a checkpoint was made for 8-bit integer products, according to its config."""
    inputs = [group.get("input_activations") for group in _groups(quantization)]
    eight = [isinstance(i, Mapping) and (i.get("num_bits"), i.get("type")) == (8, "int") for i in inputs]
    return bool(eight) and all(eight)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds. `generate_seconds` is prefill and decode together; `low` to `high` is its range."""

    start_seconds: float
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    generate_seconds: float
    low: float
    high: float

    @property
    def wall_seconds(self) -> float:
        """Seconds from the start of the engine's process to the last row. Commits happen meanwhile."""
        return self.start_seconds + self.load_seconds + self.generate_seconds


class Job:
    """The simulated steps of a job, for three estimates of its output lengths. Any setting's time follows from them.

    Steps are simulated when they are first asked for.
    """

    def __init__(self, shape: JobShape, config: EngineConfig) -> None:
        """Raises `Refused` for a model that cannot run."""
        self.shape, self.config, self.model = shape, config, read_shape(config.model)
        self.grains = _grains(config)
        self._prompts = shape.sample(config)
        self._most = shape.most_tokens(self._prompts)

    @cached_property
    def high(self) -> Steps:
        """The steps if each row has all tokens that it may have."""
        return self._steps(self._most)

    @cached_property
    def central(self) -> Steps:
        """The steps if answers have their usual lengths."""
        if self.shape.sampling.ignore_eos:
            return self.high
        return self._steps(np.clip(_usual_lengths(len(self._prompts)), 1, self._most))

    @cached_property
    def low(self) -> Steps:
        """The steps if each row has a small share of the tokens that it may have."""
        return (
            self.high
            if self.shape.sampling.ignore_eos
            else self._steps(np.ceil(LEAST_SHARE * self._most).astype(np.int64))
        )

    def measured(self, cost: DeviceCost, setting: Setting) -> bool:
        """Return whether the device's costs have all quantities of which the job's steps consist."""
        step = cost.steps.get(setting.products)
        if step is None:
            return False
        weights = Weights(1, 1, cost.cache_bytes)
        needed = quantities(self.high.work, self.model, weights, setting.kv_cache, self._sampling)
        return needed.keys() <= step.seconds.keys()

    def predict(self, cost: DeviceCost, setting: Setting) -> Prediction:
        """Predict the job's times for a setting that was measured."""
        prefill, decode = self.seconds_by_phase(self.central, cost, setting)
        low, high = (self.seconds(steps, cost, setting) for steps in (self.low, self.high))
        load = cost.load_seconds[setting.products] * layer_weights(self.model)
        return Prediction(cost.start_seconds, load, prefill, decode, prefill + decode, low, high)

    def steps_for(self, outputs: Mapping[int, int]) -> Steps:
        """Return the steps for known output lengths; `outputs` maps new tokens -> number of rows."""
        histogram = np.zeros(max(outputs) + 1, np.int64)
        for length, count in outputs.items():
            histogram[length] = count
        return self._steps(np.clip(_quantiles(histogram, _spread(len(self._prompts))), 1, self._most))

    def seconds(self, steps: Steps, cost: DeviceCost, setting: Setting) -> float:
        """Return the seconds of generating in these steps."""
        return sum(self.seconds_by_phase(steps, cost, setting))

    def draft_gains(self, rows: int, cost: DeviceCost, setting: Setting) -> Floats:
        """Return how many times as many tokens a second steps with drafts give as steps without, by the share of drafts
        that are right: [101], for 0 to 100 %.

        A step has `DRAFTS` drafts for each of `rows` rows.
        """
        lengths = self.shape.lengths
        context = float(lengths @ np.arange(len(lengths))) / max(int(lengths.sum()), 1)
        context += float(self.shape.most_tokens(np.array([round(context)]))[0]) / 2
        queries = np.array([rows, rows * (1 + DRAFTS)], np.float64)
        tokens = np.array([padded_size(int(n), self.grains[0]) for n in queries], np.float64)
        none = np.zeros(2)
        work = Work(tokens, queries, queries, queries * context, none, none, none)
        plain, drafted = cost.seconds(setting.products, work, self.model, setting.kv_cache, self._sampling).tolist()
        right = np.arange(101)[:, None] / 100
        gains: Floats = (right ** np.arange(1 + DRAFTS)).sum(1) * plain / drafted
        return gains

    def drafts_pay(self, rows: int, cost: DeviceCost, setting: Setting) -> float | None:
        """Return the least share of right drafts at which steps with drafts are faster, or None if they never are."""
        pays = np.flatnonzero(self.draft_gains(rows, cost, setting) > 1)
        return float(pays[0]) / 100 if len(pays) else None

    def step_sizes(self) -> dict[int, int]:
        """Return tokens of a step, with padding -> number of steps, by the central estimate."""
        sizes, index = np.unique(self.central.work.tokens, return_inverse=True)
        counts = np.bincount(index, self._repeats(self.central))
        return {int(size): round(count) for size, count in zip(sizes, counts, strict=True)}

    def _steps(self, outputs: Ints) -> Steps:
        shared = self.shape.shared_tokens // max(self.shape.rows, 1)
        return simulate(self._prompts, outputs, self.config, shared, *self.grains)

    def seconds_by_phase(self, steps: Steps, cost: DeviceCost, setting: Setting) -> tuple[float, float]:
        """Return (prefill, decode) seconds. A step with both is split by its tokens, as in the engine's statistics."""
        taken = cost.seconds(setting.products, steps.work, self.model, setting.kv_cache, self._sampling)
        taken *= self._repeats(steps)
        share = steps.prompt_tokens / np.maximum(steps.prompt_tokens + steps.new_tokens, 1)
        return float(taken @ share), float(taken @ (1 - share))

    def _repeats(self, steps: Steps) -> Floats:
        """Return how often the whole job has each step of the sample [n]. Steps at the end, when no row waits, count
        once."""
        sampled = len(self._prompts)
        side_by_side = min(self.config.max_num_seqs, sampled)
        if sampled == self.shape.rows:
            return np.ones(len(steps.waiting))
        return np.where(steps.waiting, (self.shape.rows - side_by_side) / (sampled - side_by_side), 1.0)

    @property
    def _sampling(self) -> str:
        params = self.shape.sampling
        if params.temperature == 0:
            return "greedy"
        return "filtered" if params.top_k or params.top_p < 1 or params.min_p else "drawn"


def _grains(config: EngineConfig) -> tuple[int, int]:
    """Return the numbers of which a step's tokens and its rows of logits are multiples.

    Products in C take any number of 8-bit rows.
    """
    in_c = config.device == "cpu" and cpu_path(config.cpu_path) != REFERENCE
    of_tokens = 1 if in_c and Setting.of(config).products in ("w8a8-int8", "w4a8") else MIN_ROWS
    return of_tokens, of_tokens if config.quantization.endswith("+head") else MIN_ROWS


def _even(n: int) -> Floats:
    """Return `n` evenly spaced shares from 0 to 1, ascending [n]."""
    return np.asarray((np.arange(n) + 0.5) / max(n, 1), np.float64)


def _spread(n: int) -> Floats:
    """Return `n` evenly spread shares from 0 to 1, in an order in which neighbours differ much [n]."""
    return np.asarray((np.arange(1, n + 1) * GOLDEN) % 1.0, np.float64)


def _usual_logarithms() -> NormalDist:
    """Return the distribution of the logarithms of usual numbers of new tokens."""
    variance = float(np.log(1 + (DEVIATION / USUAL) ** 2))
    return NormalDist(float(np.log(USUAL)) - variance / 2, variance**0.5)


def _usual_lengths(n: int) -> Ints:
    """Return usual numbers of new tokens, in an order in which neighbours differ much [n]."""
    drawn = _usual_logarithms()
    return np.exp([drawn.inv_cdf(share) for share in np.clip(_spread(n), 1e-4, 1 - 1e-4).tolist()]).astype(np.int64)


def _quantiles(histogram: Ints, shares: Floats) -> Ints:
    """Return the quantiles of a histogram at these shares [n]."""
    cumulated = np.cumsum(histogram)
    return np.asarray(np.searchsorted(cumulated, shares * cumulated[-1], side="right"), np.int64)
