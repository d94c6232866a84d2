"""Comparing ways to run a job by their predicted times: products, types of keys and values, rows side by side, drafts.

Answers depend on products and on the type of keys and values. What these cost in quality is known only if somebody has
measured it; a way whose cost nobody knows is never recommended.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from batchinfer.cost.cost_model import CostModel
from batchinfer.cost.step_cost import KV_CACHES, PRODUCTS, DeviceCost, layer_weights
from batchinfer.engine.config import CPU_SHARE, KV_CACHE_BYTES, EngineConfig
from batchinfer.host.memory import available_bytes
from batchinfer.jobs.amounts import in_bytes, in_seconds
from batchinfer.jobs.plan.prediction import Job, Setting, weight_bits
from batchinfer.jobs.plan.quality_file import Quality, quality_key
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.models.config import ModelConfig
from batchinfer.models.hub import read_config

UNKNOWN_KV_BYTES = 2  # of a key's or value's element, if its type is known only once the engine runs
FACTORS = (0.25, 0.5, 1, 2, 4)  # of --max-num-seqs, that are compared
RIGHT = (0.25, 0.5, 0.75)  # shares of drafts that are right, for which times are told
WORTHWHILE = 0.95  # predicted time as a share of the job's, from which down another way is worth a word
NEARLY = 1.01  # times the least time, up to which fewer rows side by side are preferred: they take less memory
AS_THE_CHECKPOINT = "as the checkpoint is"


@dataclass(frozen=True)
class Candidate:
    """A way to run the job, its predicted seconds of generating, and its quality; None: not known."""

    quantization: str  # the flag that chooses it
    products: str
    kv_cache: str
    generate_seconds: float
    quality: str | None

    @property
    def setting(self) -> Setting:
        return Setting(self.products, self.kv_cache)

    def __str__(self) -> str:
        return f"{self.products}, KV {self.kv_cache}"


@dataclass(frozen=True)
class SideBySide:
    """What a number of rows side by side takes: predicted seconds of generating, and bytes of keys and values at their
    fullest."""

    generate_seconds: float
    kv_cache_bytes: int


@dataclass(frozen=True)
class Better:
    """The fastest way whose quality is known: the flags that choose it, and its predicted seconds of generating."""

    flags: list[str]
    generate_seconds: float
    quality: str

    def __str__(self) -> str:
        return f"{in_seconds(self.generate_seconds)} of generating with {' '.join(self.flags)} ({self.quality})"


@dataclass(frozen=True)
class Comparison:
    """What other ways to run a job would take. All seconds are of generating, without drafts unless said."""

    candidates: list[Candidate]  # fastest first
    held: int | None  # rows side by side that memory holds, each at its longest
    side_by_side: dict[int, SideBySide]  # by rows side by side, ascending
    with_drafts: dict[str, float]  # share of drafts that are right -> seconds with drafts in every step
    better: Better | None  # None: no way of known quality is notably faster than the job as it is

    def lines(self, now: Setting, places: int) -> list[tuple[str, str]]:
        """Return lines for the plan's table, for a job with the setting `now` and `places` rows side by side."""
        shown = [c for c in self.candidates if c.setting == now or c.quality is not None or c in self.candidates[:4]]
        lines = [
            (f"  {c}", f"{in_seconds(c.generate_seconds)} of generating; {_quality(c)}{_mark(c.setting == now)}")
            for c in shown
        ]
        for rows, found in self.side_by_side.items():
            taken = f"{in_seconds(found.generate_seconds)} of generating, KV {in_bytes(found.kv_cache_bytes)}"
            fits = " <- memory holds no more at their longest" if rows == self.held != places else ""
            lines.append((f"  {rows} side by side", f"{taken}{_mark(rows == places)}{fits}"))
        if self.with_drafts:
            times = "; ".join(f"{share} right: {in_seconds(seconds)}" for share, seconds in self.with_drafts.items())
            lines.append(("  drafts in each step", times))
        if self.better is not None:
            lines.append(("fastest known", str(self.better)))
        return lines

    def unknown(self, now: Setting) -> Candidate | None:
        """Return the fastest way, if it is notably faster than those of known quality and its own is not known."""
        known = [c.generate_seconds for c in self.candidates if c.quality is not None or c.setting == now]
        fastest = next(iter(self.candidates), None)
        if fastest is None or not known or fastest.quality is not None or fastest.setting == now:
            return None
        return fastest if fastest.generate_seconds < WORTHWHILE * min(known) else None


def compare(
    job: Job, figures: LengthFigures, cost: DeviceCost, qualities: Mapping[str, Quality], room: int | None
) -> Comparison:
    """Compare ways to run the job on a measured device.

    `qualities` is what is known of the model, by `quality_key`; keys and values may take `room` bytes (None: any).
    """
    candidates = [
        Candidate(way.quantization, s.products, s.kv_cache, job.seconds(job.central, cost, s), _known(way, qualities))
        for way in ways(job.config)
        if job.measured(cost, s := Setting.of(way))
    ]
    candidates.sort(key=lambda candidate: candidate.generate_seconds)
    now = Setting.of(job.config)
    if not job.measured(cost, now):
        return Comparison(candidates, None, {}, {}, None)
    places = _Places(job, figures, cost, room)
    prefill, decode = job.seconds_by_phase(job.central, cost, now)
    gains = job.draft_gains(places.asked, cost, now)
    drafts = {f"{share:.0%}": prefill + decode / float(gains[round(100 * share)]) for share in RIGHT}
    return Comparison(candidates, places.held(now), places.compared(now), drafts, _better(candidates, places, now))


def cost_model(model: ModelConfig, setting: Setting) -> CostModel:
    """Return the operations and bytes that a model costs in this setting."""
    return CostModel.of(model, KV_CACHE_BYTES.get(setting.kv_cache, UNKNOWN_KV_BYTES), setting.stream_bytes)


def room_for_keys(job: Job) -> int | None:
    """Return the bytes that keys and values may take, as far as it can be known before weights are loaded."""
    config, model = job.config, job.model
    if config.kv_cache_memory_bytes is not None or config.device != "cpu":
        return config.kv_cache_memory_bytes
    kind = PRODUCTS.get(Setting.of(config).products)
    weights = 0.0 if kind is None else layer_weights(model) * kind.layer_bytes + model.head.size * kind.head_bytes
    return max(0, int(CPU_SHARE * (available_bytes() - weights)))


def ways(config: EngineConfig) -> list[EngineConfig]:
    """Return the configs that run this checkpoint in different settings: as asked first, then as it is, expanded, or in
    8 or 4 bits, each with every type of keys and values that is measured."""
    in_four_bits = weight_bits(read_config(config.model).get("quantization_config")) == 4
    schemes = (config.quantization, "auto", "none", "w8a8-int8", *(["w4a8"] if in_four_bits else []))
    found: dict[str, EngineConfig] = {}
    for quantization in dict.fromkeys(schemes):
        for kv_cache in KV_CACHES:
            way = replace(config, quantization=quantization, kv_cache_dtype=kv_cache)
            if Setting.of(way).products in PRODUCTS:
                found.setdefault(quality_key(way), way)
    return list(found.values())


def _known(way: EngineConfig, qualities: Mapping[str, Quality]) -> str | None:
    """Return what is known of the quality of a way to run the model."""
    key = quality_key(way)
    if key == quality_key(replace(way, quantization="auto", kv_cache_dtype="auto")):
        return AS_THE_CHECKPOINT
    return str(qualities[key]) if key in qualities else None


class _Places:
    """The job with different numbers of rows side by side, each simulated once for all settings."""

    def __init__(self, job: Job, figures: LengthFigures, cost: DeviceCost, room: int | None) -> None:
        self.job, self._figures, self._cost, self._room = job, figures, cost, room
        self.asked = min(job.config.max_num_seqs, job.shape.rows)
        self._jobs = {self.asked: job}

    def held(self, setting: Setting) -> int:
        """Return how many of the rows side by side memory holds, each with all tokens that it may have; at least 1."""
        if self._room is None:
            return self.asked
        tokens = self._room // max(cost_model(self.job.model, setting).kv_bytes_per_token, 1)
        return max(bisect_right(range(1, self.asked + 1), tokens, key=self._figures.kv_cache_tokens), 1)

    def compared(self, setting: Setting) -> dict[int, SideBySide]:
        """Predict the job with as many rows side by side as it has, as memory holds, and with fewer and more."""
        asked = self.job.config.max_num_seqs
        several = {max(1, min(round(factor * asked), self.job.shape.rows)) for factor in FACTORS}
        return {places: self._of(places, setting) for places in sorted({self.held(setting), *several})}

    def best(self, setting: Setting) -> tuple[int, float]:
        """Return (rows side by side, seconds) of the fastest that memory holds, or of fewer rows that are about as
        fast."""
        held = self.held(setting)
        fitting = {
            places: found.generate_seconds
            for places, found in self.compared(setting).items()
            if self._room is None or found.kv_cache_bytes <= self._room or places == held
        }
        least = min(fitting.values())
        return next((places, seconds) for places, seconds in fitting.items() if seconds <= NEARLY * least)

    def _of(self, places: int, setting: Setting) -> SideBySide:
        if places not in self._jobs:
            self._jobs[places] = Job(self.job.shape, replace(self.job.config, max_num_seqs=places))
        job = self._jobs[places]
        nbytes = self._figures.kv_cache_tokens(places) * cost_model(job.model, setting).kv_bytes_per_token
        return SideBySide(job.seconds(job.central, self._cost, setting), nbytes)


def _better(candidates: list[Candidate], places: _Places, now: Setting) -> Better | None:
    """Return the fastest way of known quality, if it is notably faster than the job as it is."""
    known = next((c for c in candidates if c.quality is not None), None)
    if known is None or known.quality is None:
        return None
    rows, seconds = places.best(known.setting)
    if seconds > WORTHWHILE * places.compared(now)[places.asked].generate_seconds:
        return None
    config = places.job.config
    flags = [] if known.quantization == config.quantization else ["--quantization", known.quantization]
    if known.kv_cache != Setting.of(replace(config, quantization=known.quantization)).kv_cache:
        flags += ["--kv-cache-dtype", known.kv_cache]
    if rows != places.asked:
        flags += ["--max-num-seqs", str(rows)]
    return Better(flags, seconds, known.quality)


def _quality(candidate: Candidate) -> str:
    return candidate.quality or "quality not known"


def _mark(this: bool) -> str:
    return " <- this job" if this else ""
