"""What the costs of a device say of a job that has ended: its time, what it saved, and how else it might have run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from batchinfer.engine.config import EngineConfig
from batchinfer.jobs.amounts import in_seconds
from batchinfer.jobs.plan.comparison import ways
from batchinfer.jobs.plan.device_file import DeviceKey, read_device_cost
from batchinfer.jobs.plan.prediction import Job, JobShape, Setting
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.spec import JobSpec

FLOATS = ("bfloat16", "float16", "float32")  # products of weights that are not quantized


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds of generating without drafts, to compare with `generate_seconds`."""

    seconds: float  # predicted before the run, from the central estimate of output lengths
    low: float
    high: float
    seconds_for_lengths: float  # predicted for the actual output lengths: the rest is the cost model's error
    unshared: float = 0.0  # the same, if no row had shared what its prompt has in common with others; 0: unknown
    others: dict[str, float] = field(default_factory=dict)  # the same, with other products, by name in `PRODUCTS`

    def lines(self) -> list[tuple[str, str]]:
        """Return lines for the report's table."""
        range_ = f"{in_seconds(self.low)} to {in_seconds(self.high)}"
        return [
            ("predicted", f"{in_seconds(self.seconds)} of generating without drafts ({range_})"),
            ("  known lengths", f"{in_seconds(self.seconds_for_lengths)}, if output lengths had been known before"),
        ]


def forecast(
    spec: JobSpec, config: EngineConfig, figures: LengthFigures, new_tokens: Mapping[int, int]
) -> Forecast | None:
    """Predict the time for the rows that a run computed; None if the device or setting was not measured.

    `new_tokens` maps a number of new tokens to the samples that have it.
    """
    cost, _ = read_device_cost(DeviceKey.of(config.device, config.cpu_path))
    if cost is None:
        return None
    setting = Setting.of(config)
    shape = JobShape.of(figures, spec.sampling, config.max_model_len, spec.sampled_by_row)
    job = Job(shape, config)
    if not job.measured(cost, setting):
        return None
    before, steps = job.predict(cost, setting), job.steps_for(new_tokens)
    unshared = Job(replace(shape, shared_tokens=0), config)
    quantized = [other for way in ways(config) if (other := Setting.of(way)).products not in FLOATS]
    others = [
        other
        for other in quantized
        if setting.products in FLOATS and other.kv_cache == setting.kv_cache and job.measured(cost, other)
    ]
    return Forecast(
        before.generate_seconds,
        before.low,
        before.high,
        job.seconds(steps, cost, setting),
        unshared.seconds(unshared.steps_for(new_tokens), cost, setting),
        {other.products: job.seconds(steps, cost, other) for other in others},
    )
