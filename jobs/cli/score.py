"""The command that scores texts: a job that generates nothing."""

from typing import Any

import typer

from batchinfer.engine.config import Speculation
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import UsageError
from batchinfer.jobs.cli.flags import SectionedCommand, takes
from batchinfer.jobs.cli.run import carry_out, fields_of
from batchinfer.jobs.flags import SCORE_FLAGS
from batchinfer.jobs.spec import JobSpec

# The likeliest token tells whether a text is what the model would answer.
LIKELIEST = SamplingParams(max_tokens=1, logprobs=1)

app = typer.Typer()


@app.command(cls=SectionedCommand)
@takes(*SCORE_FLAGS)
def score(**values: Any) -> None:
    """Tell how likely the texts of a table are, behind prompts or by themselves, and write the table with that."""
    if not any(values[name] for name in ("completion_column", "text_column", "choices", "choices_column")):
        raise UsageError(
            "nothing to score: give --completion-column, texts behind prompts, --text-column, or labels by --choices"
        )
    carry_out(score_job(**fields_of(values)), values["output"])


def score_job(**fields: Any) -> JobSpec:
    """Return the job with these fields, which generates nothing. Raises `UsageError`."""
    chooses = fields.get("choices") or fields.get("choices_column")
    return JobSpec(
        **fields,
        sampling=SamplingParams() if chooses else LIKELIEST,
        speculation=Speculation("off"),
        generation_config="none",
        reasoning_parser="none",
        tool_parser="none",
    )
