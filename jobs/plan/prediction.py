"""How long a job will take, from its lengths, the model's shape and what was measured on the device.

Output lengths are unknown before a run, unless end-of-text is ignored: the central estimate has them spread evenly from
one token to as many as a row may have; the range goes from a tenth of those for each row to all of them. Rows are taken
to run longest prompts first, all in one window, and never to wait for memory; weights in 4 bits are taken to be
expanded, and what a job's other process takes of the cores is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from batchinfer.cost.simulate_steps import Steps, simulate
from batchinfer.cost.step_cost import PRODUCTS, DeviceCost, Floats, Weights, Work, layer_weights, quantities
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.kernels.grain import MIN_ROWS, padded_size
from batchinfer.kernels.ragged import Ints
from batchinfer.models.config import ModelConfig, parse_model_config, stored_dtype
from batchinfer.models.hub import read_config

SAMPLE_ROWS = 2048
PROMPT_STEPS = 4_000  # a sample of very long prompts or answers has fewer rows
DECODING_STEPS = 100_000
DRAFTS = 4  # of a row in a step, where it is asked whether they pay
USUAL, DEVIATION = 322.0, 244.0
"""New tokens of an answer that may end by itself, before anything is known: those of ShareGPT's answers, as Kwon et al.
2023 used them; lognormal."""
LEAST_SHARE = 0.1  # of the tokens that a row may have, for the low end
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class JobShape:
    """What the time of a job depends on, beside model and device."""

    lengths: Ints  # [longest prompt + 1] how many prompts that are computed have so many tokens
    sampling: SamplingParams
    max_model_len: int
    shared_tokens: int = 0  # of the prompts, computed once for several rows

    @classmethod
    def of(cls, figures: LengthFigures, sampling: SamplingParams, max_model_len: int, samples: int) -> "JobShape":
        """Of a job whose rows are all read, with so many samples to compute of each."""
        all_tokens = int(figures.run_lengths @ np.arange(len(figures.run_lengths)))
        shared = figures.shared_tokens + (samples - 1) * all_tokens  # a second sample has all of the first one's prompt
        return cls(samples * figures.run_lengths, sampling, max_model_len, shared)

    @property
    def rows(self) -> int:
        """That are computed."""
        return int(self.lengths.sum())

    def sample(self, config: EngineConfig) -> Ints:
        """Prompt lengths of the job, or of a sample of its rows: [n], longest first."""
        prompt = max(int(self.lengths @ np.arange(len(self.lengths))) / max(self.rows, 1), 1)
        answer = min(self.sampling.max_tokens, self.max_model_len)
        most = min(
            SAMPLE_ROWS,
            int(PROMPT_STEPS * config.max_num_batched_tokens / prompt),
            DECODING_STEPS * config.max_num_seqs // answer,
        )
        return _quantiles(self.lengths, _even(min(self.rows, max(most, 4 * config.max_num_seqs))))[::-1]

    def most_tokens(self, prompts: Ints) -> Ints:
        """New tokens that rows with such prompts may have."""
        return np.minimum(self.sampling.max_tokens, self.max_model_len - prompts)


@dataclass(frozen=True)
class Setting:
    """A way to run a model: by the name of its `PRODUCTS`, and the type of keys and values."""

    products: str
    kv_cache: str

    @classmethod
    def of(cls, config: EngineConfig) -> "Setting":
        """As the engine resolves it. Raises `Refused` for a model that has no config.json."""
        raw = read_config(config.model)
        dtype = config.computed_in(stored_dtype(raw), has_float16=config.device != "cpu")
        scheme = config.quantization.removesuffix("+head")
        if scheme in ("w8a8-int8", "w4a8") or (scheme == "auto" and _has_8_bit_inputs(raw.get("quantization_config"))):
            products = "w8a8-int8"
        else:
            products = dtype if scheme in ("auto", "none") else scheme
        computed = PRODUCTS[products].kv_cache(config.device) if products in PRODUCTS else "auto"
        return cls(products, config.cached_in(computed))


def _has_8_bit_inputs(quantization: object) -> bool:
    """Whether a checkpoint was made for 8-bit integer products, as far as its config tells without its tensors."""
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    inputs = [
        group.get("input_activations")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    return bool(inputs) and all(
        isinstance(i, Mapping) and (i.get("num_bits"), i.get("type")) == (8, "int") for i in inputs
    )


@dataclass(frozen=True)
class Prediction:
    """Seconds; `generate_seconds` is prefill and decode together, `low` to `high` the range of it."""

    start_seconds: float
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    generate_seconds: float
    low: float
    high: float

    @property
    def wall_seconds(self) -> float:
        """From the start of the engine's process to the last row; commits go on meanwhile."""
        return self.start_seconds + self.load_seconds + self.generate_seconds


def read_shape(config: EngineConfig) -> ModelConfig:
    """The model's shape, whatever its weights are stored in. Raises `Refused` for a model that cannot run."""
    raw = {key: value for key, value in read_config(config.model).items() if key != "quantization_config"}
    try:
        return parse_model_config(raw)
    except ValueError as error:
        raise Refused(f"model {config.model}: {error}") from error


class Job:
    """A job's steps, counted once for each guess at its output lengths, and priced for any setting."""

    def __init__(self, shape: JobShape, config: EngineConfig) -> None:
        """Raises `Refused` for a model that cannot run."""
        self.shape, self.config, self.model = shape, config, read_shape(config)
        prompts = shape.sample(config)
        most = shape.most_tokens(prompts)
        self.high = self._steps(prompts, most)
        self.central = self.low = self.high
        if not shape.sampling.ignore_eos:
            self.central = self._steps(prompts, np.clip(_usual_lengths(len(prompts)), 1, most))
            self.low = self._steps(prompts, np.ceil(LEAST_SHARE * most).astype(np.int64))

    def measured(self, cost: DeviceCost, setting: Setting) -> bool:
        """Whether the device's costs have all that the job's steps consist of."""
        step = cost.steps.get(setting.products)
        if step is None:
            return False
        weights = Weights(1, 1, cost.cache_bytes)
        needed = quantities(self.high.work, self.model, weights, setting.kv_cache, self._sampling)
        return needed.keys() <= step.seconds.keys()

    def predict(self, cost: DeviceCost, setting: Setting) -> Prediction:
        """Of a setting that was measured."""
        prefill, decode = self._seconds(self.central, cost, setting)
        low, high = (sum(self._seconds(steps, cost, setting)) for steps in (self.low, self.high))
        load = cost.load_seconds[setting.products] * layer_weights(self.model)
        return Prediction(cost.start_seconds, load, prefill, decode, prefill + decode, low, high)

    def seconds_for(self, outputs: Mapping[int, int], cost: DeviceCost, setting: Setting) -> float:
        """Of generating, for rows of which so many (values) had so many new tokens (keys)."""
        prompts = self.shape.sample(self.config)
        histogram = np.zeros(max(outputs) + 1, np.int64)
        for length, count in outputs.items():
            histogram[length] = count
        tokens = _quantiles(histogram, _spread(len(prompts)))
        steps = self._steps(prompts, np.clip(tokens, 1, self.shape.most_tokens(prompts)))
        return sum(self._seconds(steps, cost, setting))

    def drafts_pay(self, rows: int, cost: DeviceCost, setting: Setting) -> float | None:
        """The least probability of a draft to be right at which `DRAFTS` of them in each of so many rows make a step
        give more tokens a second than one without; None where even right ones do not."""
        lengths = self.shape.lengths
        context = float(lengths @ np.arange(len(lengths))) / max(int(lengths.sum()), 1)
        context += float(self.shape.most_tokens(np.array([round(context)]))[0]) / 2
        queries = np.array([rows, rows * (1 + DRAFTS)], np.float64)
        tokens = np.array([padded_size(int(n), MIN_ROWS) for n in queries], np.float64)
        none = np.zeros(2)
        work = Work(tokens, queries, queries, queries * context, none, none, none)
        plain, drafted = cost.seconds(setting.products, work, self.model, setting.kv_cache, self._sampling).tolist()
        right = np.arange(0, 1.01, 0.01)
        gain = (right[:, None] ** np.arange(1 + DRAFTS)).sum(1) * plain / drafted
        pays = np.flatnonzero(gain > 1)
        return float(right[pays[0]]) if len(pays) else None

    def step_sizes(self) -> dict[int, int]:
        """Tokens of a step, padded -> steps, by the central estimate."""
        sizes, places = np.unique(self.central.work.tokens, return_inverse=True)
        counts = np.bincount(places, self._repeats(self.central))
        return {int(size): round(count) for size, count in zip(sizes, counts, strict=True)}

    def _steps(self, prompts: Ints, outputs: Ints) -> Steps:
        shared = self.shape.shared_tokens // max(self.shape.rows, 1)
        return simulate(prompts, outputs, self.config, shared)

    def _seconds(self, steps: Steps, cost: DeviceCost, setting: Setting) -> tuple[float, float]:
        """(prefill, decode): a step of both is shared out by tokens, as the engine's report does it."""
        taken = cost.seconds(setting.products, steps.work, self.model, setting.kv_cache, self._sampling)
        taken *= self._repeats(steps)
        share = steps.prompt_tokens / np.maximum(steps.prompt_tokens + steps.new_tokens, 1)
        return float(taken @ share), float(taken @ (1 - share))

    def _repeats(self, steps: Steps) -> Floats:
        """[n] how often the whole job has each step of the sample: its end, when places stay empty, comes but once."""
        sampled = len(self.shape.sample(self.config))
        places = min(self.config.max_num_seqs, sampled)
        if sampled == self.shape.rows:
            return np.ones(len(steps.waiting))
        return np.where(steps.waiting, (self.shape.rows - places) / (sampled - places), 1.0)

    @property
    def _sampling(self) -> str:
        params = self.shape.sampling
        if params.temperature == 0:
            return "greedy"
        return "filtered" if params.top_k or params.top_p < 1 or params.min_p else "drawn"


def _even(n: int) -> Floats:
    """[n] shares from 0 to 1, in order."""
    return np.asarray((np.arange(n) + 0.5) / max(n, 1), np.float64)


def _spread(n: int) -> Floats:
    """[n] shares from 0 to 1, evenly spread, neighbours far from each other."""
    return np.asarray((np.arange(1, n + 1) * GOLDEN) % 1.0, np.float64)


def _usual_lengths(n: int) -> Ints:
    """[n] new tokens, neighbours far from each other."""
    variance = float(np.log(1 + (DEVIATION / USUAL) ** 2))
    drawn = NormalDist(np.log(USUAL) - variance / 2, variance**0.5)
    return np.exp([drawn.inv_cdf(share) for share in np.clip(_spread(n), 1e-4, 1 - 1e-4).tolist()]).astype(np.int64)


def _quantiles(histogram: Ints, shares: Floats) -> Ints:
    """The values that these shares of a histogram's members are below."""
    cumulated = np.cumsum(histogram)
    return np.asarray(np.searchsorted(cumulated, shares * cumulated[-1], side="right"), np.int64)
