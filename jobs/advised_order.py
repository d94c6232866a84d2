"""Advice of `plan`: another order of the template's fields, in which prompts share more."""

from dataclasses import dataclass

import numpy as np

from batchinfer.jobs.amounts import in_seconds
from batchinfer.jobs.field_reordering import NOTABLE, Reordering
from batchinfer.jobs.preflight import Preflight
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.prompts import parse_template, rendered
from batchinfer.jobs.rows.template_order import TemplateLines

FIRST_ROWS = 1000  # rows that are tokenized to know how long a token is


@dataclass(frozen=True)
class AdvisedOrder:
    """A better order of a template's fields. Its figures are estimates."""

    fields: list[str]  # of the whole template
    shared_tokens: int  # prompt tokens that are shared beside those that are shared as the template is
    prompt_tokens: int  # of all prompts
    seconds: float | None = None  # of generating that are saved; None if the device was not measured
    step: int = 1  # of how many rows one was looked at

    def __str__(self) -> str:
        saved = "" if self.seconds is None else f", {in_seconds(self.seconds)} less"
        sampled = f" (by every {self.step}th row)" if self.step > 1 else ""
        return (
            f"{', '.join(self.fields)}: about {self.shared_tokens:,} more of {self.prompt_tokens:,} prompt tokens "
            f"shared{saved}{sampled}; --reorder-fields makes it so"
        )


def advised_order(job: Preflight, figures: LengthFigures) -> AdvisedOrder | None:
    """Return the order that `--reorder-fields` would take, if it shares notably more; `figures` are those of all rows.

    None also for a job that has begun, whose order is settled, and for a shard, whose order all rows decide. Bytes are
    taken for tokens by the mean length of a token in the first rows, and what a chat template adds for a beginning
    that all prompts have. Raises `Refused` if a file is damaged.
    """
    spec = job.spec
    if spec.prompt_template is None or spec.reorder_fields or spec.shard is not None:
        return None
    if not any(len(run) > 1 for run in TemplateLines.of(spec.prompt_template).runs):
        return None
    if not spec.overwrite and RunFolder(spec.output).prompt_template is not None:
        return None
    found = Reordering.of(spec.prompt_template, job.table)
    if found.best == found.given:
        return None
    of_a_byte, added = _token_lengths(job)
    grain, step = job.config.prefix_grain, found.values.step
    before, after = (
        int(((added + of_a_byte * found.shared(template)).astype(np.int64) // grain).sum()) * grain * step
        for template in (found.given, found.best)
    )
    if after - before < NOTABLE * figures.prompt_tokens or after == before:
        return None
    return AdvisedOrder(found.best.fields, after - before, figures.prompt_tokens, None, step)


def _token_lengths(job: Preflight) -> tuple[float, float]:
    """Return (tokens of a byte, tokens that each prompt has beside the template's text), by the first rows that run."""
    template = parse_template(str(job.spec.prompt_template))
    for first, batch in job.table.batches(job.source.columns, FIRST_ROWS):
        requests, _ = job.source.tokenize(first, batch)
        if len(requests):
            texts = rendered(template, batch, {}).take(requests.rows - first).to_pylist()
            tokens = len(job.tokenizer.encode_batch(texts, job.spec.allow_special_tokens)[0])
            added = (len(requests.token_ids) - tokens) / len(texts)
            return tokens / sum(len(text.encode()) for text in texts), max(added, 0.0)
    return 0.0, 0.0
