"""`Job`: a table of random prompts, each with lengths of its own."""

from dataclasses import dataclass, replace

import numpy as np

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable


@dataclass(frozen=True)
class Job:
    """A job of rows whose prompts and new tokens have lengths between two bounds, their logarithms spread evenly."""

    name: str
    rows: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    seconds: float  # that it may take
    common: int = 0  # tokens with which all prompts begin
    phrase: int = 0  # tokens of the phrase that a prompt repeats; 0: it repeats none
    temperature: float = 1.0  # random tokens, of which drafts find none: steps are as in a job without drafts

    @property
    def longest(self) -> int:
        """Tokens of a row at most."""
        return self.prompt[1] + self.new[1]

    @property
    def tokens(self) -> int:
        """Keys and values of all rows at most, in whole blocks and with drafts."""
        prompts, new = self._lengths()
        return int((prompts + new + 64).sum())

    def requests(self, vocab: int) -> Requests:
        """The table, the same at every call."""
        rng = np.random.default_rng(1)
        prompts, new = self._lengths()
        common = rng.integers(2, vocab, self.common).tolist()
        texts = []
        for length in prompts.tolist():
            own = rng.integers(2, vocab, self.phrase or max(length - self.common, 1)).tolist()
            texts.append((common + own * (length // len(own) + 1))[:length])
        found = Requests.of(texts, SamplingParams(), seeds=range(self.rows))
        lengths, index = np.unique(new, return_inverse=True)
        params = (SamplingParams(max_tokens=n, temperature=self.temperature, ignore_eos=True) for n in lengths.tolist())
        return replace(found, params=SamplingTable.of(list(params)), param_index=index.astype(np.int32))

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        prompts, new = (
            np.exp(rng.uniform(np.log(low), np.log(high + 1), self.rows)).astype(np.int64).clip(low, high)
            for low, high in (self.prompt, self.new)
        )
        return prompts, new


def _by_name(*jobs: Job) -> dict[str, Job]:
    return {job.name: job for job in jobs}


JOBS = _by_name(
    Job("256 ragged rows", 256, (32, 1024), (16, 256), 10.0),
    Job("1,024 ragged rows", 1024, (32, 1024), (16, 256), 16.0),
    Job("template", 256, (1000, 1000), (64, 64), 6.0, common=600),
    Job("phrases", 16, (256, 256), (128, 128), 6.0, phrase=32, temperature=0.0),
)
SMOKE = _by_name(
    Job("256 ragged rows", 2, (3, 9), (1, 2), 60.0),
    Job("1,024 ragged rows", 2, (3, 5), (1, 2), 60.0),
    Job("template", 2, (66, 66), (1, 1), 60.0, common=64),
    Job("phrases", 1, (12, 12), (3, 3), 60.0, phrase=3, temperature=0.0),
)
