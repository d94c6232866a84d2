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
PARQUET: dict[str, Any] = {"write_page_checksum": True, "compression": "zstd"}
