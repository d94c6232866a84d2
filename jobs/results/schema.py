"""The result columns. Parts have them after the row's ordinal, the output has them after the input's columns.

Every job has `RESULT_FIELDS`. Columns that are parsed out of the text stand behind it, and others that a job asks for
behind all of these; `samples` is always the last.
"""

from collections.abc import Collection, Sequence
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
# What is taken out of the text, in jobs whose answers are parsed; it stands behind the text.
TOOL_CALL = pa.struct([pa.field("name", pa.string()), pa.field("arguments", pa.string())])
PARSED_FIELDS = [pa.field("reasoning", pa.string()), pa.field("tool_calls", pa.list_(TOOL_CALL))]
SAMPLES = "samples"
# Parquet's name for the samples' column of completion tokens
SAMPLE_TOKENS = f"{SAMPLES}.list.element.completion_tokens"
COUNTED = ["finish_reason", "prompt_tokens", "completion_tokens", "error_code"]
PARQUET: dict[str, Any] = {"write_page_checksum": True, "compression": "zstd"}


def result_fields(
    lists_samples: bool = False, parsed: Collection[str] = (), asked: Sequence[pa.Field] = ()
) -> list[pa.Field]:
    """Return the result columns of a job with these parsed columns, and the columns `asked`.

    If the job lists samples, the last column has all samples of a row, or is null if the row failed. The other columns
    are those of the first sample.
    """
    text, *others = RESULT_FIELDS
    fields = [text, *(field for field in PARSED_FIELDS if field.name in parsed), *others, *asked]
    return [*fields, pa.field(SAMPLES, pa.list_(sample_type(parsed)))] if lists_samples else fields


def sample_type(parsed: Collection[str] = ()) -> pa.StructType:
    """Return the type of a sample, in a job with these parsed columns."""
    unlike = ("prompt_tokens", "error_code", "error_message")
    return pa.struct([field for field in result_fields(parsed=parsed) if field.name not in unlike])


def part_schema(results: Sequence[pa.Field] = RESULT_FIELDS) -> pa.Schema:
    """Return the columns of the parts of a job with these result columns."""
    return pa.schema([pa.field(ROW, pa.int64(), nullable=False), KEY, *results])


def is_part(schema: pa.Schema) -> bool:
    """Return whether a part may have these columns; those of earlier versions have no key."""
    whole = part_schema(result_fields(parsed=[field.name for field in PARSED_FIELDS if field.name in schema.names]))
    begins = (pa.schema(list(schema)[: len(known)]).equals(known) for known in (whole, keyless(whole)))
    return any(begins)


def keyless(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a part without the key, which parts of earlier versions do not have."""
    return schema.remove(schema.get_field_index(KEY.name))


def has_samples(schema: pa.Schema) -> bool:
    """Return whether a part or an output has the column of samples.

    That is the last column. An input column of the same name would stand before the results.
    """
    return bool(schema.names[-1] == SAMPLES)


def counted(schema: pa.Schema) -> list[str]:
    """Return the columns of a part or an output that are counted, as Parquet names them."""
    return [*COUNTED, SAMPLE_TOKENS] if has_samples(schema) else COUNTED
