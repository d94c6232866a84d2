"""Guessing from a table's first rows how its prompts are likely to be made, for `batchinfer init`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.jobs.rows.prompts import fits_template
from batchinfer.jobs.rows.text_columns import is_text
from batchinfer.jobs.tables.json_lines import indices_not_text, parse
from batchinfer.jobs.tables.table import Table

FIRST_ROWS = 1000  # rows that are looked at
BATCH_FIELDS = {"custom_id", "method", "url", "body"}
CHATS = ("messages", "conversation", "conversations", "chat")
PROMPTS = ("prompt", "instruction", "question", "query")
"""Names of columns that are prompts by themselves, the likeliest first."""
TEXTS = ("text", "review", "content", "body", "document", "article", "message", "input", "description", "comment")
"""Names of columns that prompts are made of, the likeliest first."""
LABELS = 0.2  # of the rows: a text column with fewer different values is taken for labels


@dataclass(frozen=True)
class Guess:
    """How the prompts of a table are likely to be made: `kind` is batch, messages, prompt, text or none."""

    kind: str
    column: str = ""
    id_column: str | None = None
    others: tuple[str, ...] = ()  # further columns of text that a template can name, in the table's order
    nulls: int = 0  # of the column, in the rows that were looked at
    rows: int = 0  # that were looked at


def guess(table: Table) -> Guess:
    """Guess from the first rows of a table. Raises `Refused` if a file is damaged."""
    _, batch = next(table.batches(None, FIRST_ROWS), (0, None))
    if batch is None or not len(batch):
        return Guess("none")
    columns = {name: batch.column(name) for name in batch.schema.names}
    if columns.keys() >= BATCH_FIELDS:
        return Guess("batch", rows=len(batch))
    id_column = next((name for name in columns if _is_id(name, batch)), None)
    if (chats := next((name for name in columns if _holds_chats(name, columns[name])), None)) is not None:
        return Guess("messages", chats, id_column, (), columns[chats].null_count, len(batch))
    texts = {name: column for name, column in columns.items() if name != id_column and is_text(column.type)}
    if not texts:
        return Guess("none", id_column=id_column, rows=len(batch))
    chosen = _likeliest(texts)
    kind = "prompt" if chosen.lower() in PROMPTS or not fits_template(chosen) else "text"
    others = tuple(name for name in texts if name != chosen and fits_template(name) and _has_values(texts[name]))
    return Guess(kind, chosen, id_column, others, columns[chosen].null_count, len(batch))


def is_batch_file(inputs: tuple[Path, ...]) -> bool:
    """Return whether the first line of the first file is a request in the format of OpenAI's batch API."""
    file = inputs[0]
    if file.suffix not in (".jsonl", ".ndjson") or not file.is_file():
        return False
    with file.open("rb") as opened:
        line = opened.readline(1 << 20)
    try:
        value = parse(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() >= BATCH_FIELDS


def _likeliest(texts: Mapping[str, pa.Array]) -> str:
    """Return the column of a likely name, else the one with the longest texts."""
    for names in (PROMPTS, TEXTS):
        for wanted in names:
            if (found := next((name for name in texts if name.lower() == wanted), None)) is not None:
                return found
    varied = {name: column for name, column in texts.items() if _different(column) > LABELS} or texts
    return max(varied, key=lambda name: _mean_length(varied[name]))


def _holds_chats(name: str, column: pa.Array) -> bool:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inside = kind.value_type
        return pa.types.is_struct(inside) and {field.name for field in inside} >= {"role", "content"}
    if not is_text(kind) or name.lower() not in CHATS:
        return False
    first = next((text for text in _texts(column) if text is not None), "")
    return first.lstrip().startswith("[")


def _is_id(name: str, batch: pa.RecordBatch) -> bool:
    """Return whether a column is called an id, and its first rows have one each, all of one kind."""
    low = name.lower()
    named = low in ("id", "uuid", "key") or low.endswith(("_id", "-id", " id")) or name.endswith(("Id", "ID"))
    column = batch.column(name)
    of_one_kind = pa.types.is_integer(column.type) or (is_text(column.type) and not indices_not_text(batch, name))
    return named and of_one_kind and not column.null_count and _different(column) == 1


def _has_values(column: pa.Array) -> bool:
    return bool(column.null_count < len(column))


def _different(column: pa.Array) -> float:
    return float(pc.count_distinct(column, mode="all").as_py()) / max(len(column), 1)


def _mean_length(column: pa.Array) -> float:
    return float(pc.mean(pc.utf8_length(column.cast(pa.large_string()))).as_py() or 0)


def _texts(column: pa.Array) -> list[str | None]:
    found: list[str | None] = column.cast(pa.large_string()).to_pylist()
    return found
