"""Joining the timelines of shards: what machines side by side did together, over the time that they share."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.timeline import MOST, Sample

Floats = NDArray[np.float64]
COUNTS = ("rows", "prompt_tokens", "completion_tokens")


def side_by_side(timelines: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return the samples of all shards as one timeline of at most `MOST` samples.

    They are joined by Unix time, and time in which no shard generated is left out. The new samples span equal times,
    about as long as the shards' own. Counts and rows side by side add up; the share of the KV cache in use is the mean
    over the shards at work. Within a sample of a shard its figures are taken to be spread evenly.
    """
    own = [_Sums(samples) for samples in timelines if samples]
    if not own:
        return []
    times = np.unique(np.concatenate([sums.times for sums in own]))
    at_work = np.diff(sum(sums.at("seconds", times) for sums in own)) > 0
    clock = np.concatenate([[0.0], np.cumsum(np.diff(times) * at_work)])  # seconds at work until each time
    usual = sum(sums.seconds for sums in own) / sum(map(len, timelines))
    count = min(MOST, max(1, round(clock[-1] / usual))) if usual > 0 else 1
    # `interp` takes the later of two times between which the clock stands still: somebody is at work again there.
    edges = np.interp(np.linspace(0, clock[-1], count + 1), clock, times)

    def between(name: str) -> Floats:
        """Return a figure's sum over all shards [count], from each edge to the next; counts are whole numbers."""
        until = sum(sums.at(name, edges[1:]) for sums in own)
        return np.diff(np.rint(until) if name in COUNTS else until, prepend=0.0)

    counts = {name: between(name) for name in COUNTS}
    of_machines, running, cache = (between(name) for name in ("seconds", "running", "kv_cache_used"))
    seconds = clock[-1] / count
    return [
        Sample(
            began=float(edges[i]),
            seconds=float(seconds),
            **{name: int(counts[name][i]) for name in COUNTS},
            running=float(running[i] / seconds) if seconds > 0 else 0.0,
            kv_cache_used=float(cache[i] / of_machines[i]) if of_machines[i] > 0 else 0.0,
        )
        for i in range(count)
    ]


class _Sums:
    """The figures of a shard, summed up from its first sample to any time."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        seconds = np.array([sample.seconds for sample in samples])
        began = np.array([sample.began for sample in samples])
        # [2n]: when each sample began and ended, in order also if the clock was put back while the shard ran.
        self.times: Floats = np.maximum.accumulate(np.stack([began, began + seconds], 1).ravel())
        weights = {name: np.array([getattr(sample, name) for sample in samples], float) for name in COUNTS}
        weights |= {name: seconds * [getattr(s, name) for s in samples] for name in ("running", "kv_cache_used")}
        weights["seconds"] = seconds
        self._sums = {name: np.repeat(np.cumsum([0.0, *each]), 2)[1:-1] for name, each in weights.items()}
        self.seconds = float(seconds.sum())

    def at(self, name: str, times: Floats) -> Floats:
        """Return the sum of a figure, or of a mean times its seconds, until each time."""
        found: Floats = np.interp(times, self.times, self._sums[name])
        return found
