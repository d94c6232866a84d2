"""The result columns. Parts have them after the row's ordinal, the output has them after the input's columns.

Every job has `RESULT_FIELDS`. Columns that a job asks for stand behind these, and `samples` is always the last.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

ROW = "row"  # name of the column with the row's ordinal in the input; only in parts
RESULT_FIELDS = [
    pa.field("generated_text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
]
# Only in parts: a digest of what a row's answer depends on besides the job (rows/answer_keys.py); null if the row
# did not run.
KEY = pa.field("key", pa.binary(16))
PART_SCHEMA = pa.schema([pa.field(ROW, pa.int64(), nullable=False), KEY, *RESULT_FIELDS])
# With several samples a row, this column lists them all, or is null if the row failed. The other columns are those of
# the first sample.
SAMPLE = pa.struct([RESULT_FIELDS[0], RESULT_FIELDS[1], RESULT_FIELDS[3]])
SAMPLES = pa.field("samples", pa.list_(SAMPLE))
SAMPLE_TOKENS = (
    f"{SAMPLES.name}.list.element.completion_tokens"  # Parquet's name for the samples' column of completion tokens
)
COUNTED = ["finish_reason", "prompt_tokens", "completion_tokens", "error_code"]
PARQUET: dict[str, Any] = {"write_page_checksum": True, "compression": "zstd"}


def result_fields(samples: int, asked: Sequence[pa.Field] = ()) -> list[pa.Field]:
    """Return the result columns of a job with this number of samples for each row, and with the columns `asked`."""
    return [*RESULT_FIELDS, *asked, *([SAMPLES] if samples > 1 else [])]


def part_schema(fields: Sequence[pa.Field]) -> pa.Schema:
    """Return the columns of the parts of a job with these result columns."""
    return pa.schema([*list(PART_SCHEMA)[:2], *fields])


def is_part(schema: pa.Schema) -> bool:
    """Return whether a part may have these columns; those of earlier versions have no key."""
    begins = (pa.schema(list(schema)[: len(known)]).equals(known) for known in (PART_SCHEMA, keyless(PART_SCHEMA)))
    return any(begins)


def keyless(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a part without the key, which parts of earlier versions do not have."""
    return schema.remove(schema.get_field_index(KEY.name))


def has_samples(schema: pa.Schema) -> bool:
    """Return whether a part or an output has the column of samples.

    That is the last column. An input column of the same name would stand before the results.
    """
    return bool(schema.names[-1] == SAMPLES.name)


def counted(schema: pa.Schema) -> list[str]:
    """Return the columns of a part or an output that are counted, as Parquet names them."""
    return [*COUNTED, SAMPLE_TOKENS] if has_samples(schema) else COUNTED
