"""The result columns. Parts have them after the row's ordinal, the output has them after the input's columns."""

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


def result_fields(samples: int) -> list[pa.Field]:
    """Return the result columns of a job with this number of samples for each row."""
    return [*RESULT_FIELDS, SAMPLES] if samples > 1 else RESULT_FIELDS


def part_schema(samples: int) -> pa.Schema:
    """Return the columns of the parts of a job with this number of samples for each row."""
    return PART_SCHEMA.append(SAMPLES) if samples > 1 else PART_SCHEMA


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
