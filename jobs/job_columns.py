"""The result columns of a job, by its flags."""

import pyarrow as pa

from batchinfer.jobs.results.label_columns import label_fields
from batchinfer.jobs.results.schema import result_fields
from batchinfer.jobs.results.score_columns import answer_score_fields, prompt_score_fields, text_score_fields
from batchinfer.jobs.results.structure_columns import structure_fields
from batchinfer.jobs.spec import JobSpec


def fields_of(spec: JobSpec) -> list[pa.Field]:
    """Return the columns that the job writes beside the input's. Raises `UsageError` if they do not fit together."""
    asked = [*label_fields(spec), *structure_fields(spec, spec.sampling), *text_score_fields(spec)]
    if spec.scores_texts:
        return result_fields(asked=asked, generates=False)
    asked += prompt_score_fields(spec.sampling)
    return result_fields(spec.lists_samples, spec.parsed, asked, answer_score_fields(spec.most_logprobs))
