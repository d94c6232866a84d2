"""The flags for answers that follow a grammar, beside those that `SamplingParams` has."""

from dataclasses import dataclass
from typing import Annotated

from batchinfer.flag import Flag


@dataclass(frozen=True, kw_only=True)
class StructureFlags:
    """A user's choices for structured answers."""

    json_schema_column: Annotated[
        str | None, Flag("Let each answer be JSON that the schema in this column allows.", "Structure", "COLUMN")
    ] = None
    output_columns: Annotated[
        bool, Flag("Write each property of --json-schema as a column of its type too.", "Structure")
    ] = False
