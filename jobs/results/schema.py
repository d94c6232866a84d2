"""The columns of results: in parts, with the row's ordinal, and in the output, behind the input's."""

from typing import Any

import pyarrow as pa

ROW = "row"  # the input ordinal; only in parts
RESULT_FIELDS = [
    pa.field("generated_text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
]
PART_SCHEMA = pa.schema([pa.field(ROW, pa.int64(), nullable=False), *RESULT_FIELDS])
# With several samples of a row: all of them in order, null where the row failed. The columns before are the first's.
SAMPLE = pa.struct([RESULT_FIELDS[0], RESULT_FIELDS[1], RESULT_FIELDS[3]])
SAMPLES = pa.field("samples", pa.list_(SAMPLE))
SAMPLE_TOKENS = f"{SAMPLES.name}.list.element.completion_tokens"  # as Parquet names that column of theirs
COUNTED = ["finish_reason", "prompt_tokens", "completion_tokens", "error_code"]
PARQUET: dict[str, Any] = {"write_page_checksum": True, "compression": "zstd"}


def result_fields(samples: int) -> list[pa.Field]:
    """The columns of results of a job with so many samples of a row."""
    return [*RESULT_FIELDS, SAMPLES] if samples > 1 else RESULT_FIELDS


def part_schema(samples: int) -> pa.Schema:
    """The columns of its parts."""
    return PART_SCHEMA.append(SAMPLES) if samples > 1 else PART_SCHEMA


def has_samples(schema: pa.Schema) -> bool:
    """Whether a part or an output has them. A column of the input's with that name stands before the results."""
    return bool(schema.names[-1] == SAMPLES.name)


def counted(schema: pa.Schema) -> list[str]:
    """The columns of a part or an output that are counted, as Parquet names them."""
    return [*COUNTED, SAMPLE_TOKENS] if has_samples(schema) else COUNTED
