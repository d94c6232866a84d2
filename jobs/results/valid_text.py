"""Making all text valid UTF-8 before it is written, since readers refuse a whole file for one value that is not."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def with_valid_text(
    batches: Iterable[tuple[int, pa.RecordBatch]], replaced: Counter[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the batches with U+FFFD in place of bytes in text that are not UTF-8, at any depth.

    The bytes are replaced as by `bytes.decode(errors="replace")`. `replaced` counts by column the values that had such
    bytes.
    """
    for first, batch in batches:
        yield first, _with_valid_columns(batch, replaced)
        del batch  # frees a large cell while the next batch is read


def _with_valid_columns(batch: pa.RecordBatch, replaced: Counter[str]) -> pa.RecordBatch:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        valid, count = _valid(column)
        columns.append(valid)
        if count:
            replaced[name] += count
    return pa.record_batch(columns, batch.schema)


def _valid(array: pa.Array) -> tuple[pa.Array, int]:
    """Return (the array with valid text, the number of values that were not); without such values the array itself.

    pyarrow checks the text of dictionaries as it reads them, so no dictionary has such values.
    """
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return _replaced(array)
    return array, 0


def _replaced(array: pa.Array) -> tuple[pa.Array, int]:
    kind, types = array.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        storage, count = _valid(array.storage)
        return kind.wrap_array(storage), count
    if types.is_struct(kind):
        children, counts = zip(*map(_valid, array.flatten()), strict=True)
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null()), sum(counts)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _text(array)
    return _lists(array) if types.is_nested(kind) else (array, 0)


def _lists(array: pa.Array) -> tuple[pa.Array, int]:
    """Replace bytes in an array of lists of any kind, or of maps, which are lists of entries."""
    kind, types, absent = array.type, pa.types, array.is_null()
    if types.is_map(kind):
        array = array.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    offsets = pa.array(np.append(0, np.cumsum(lengths.to_numpy(False))), lengths.type)
    values, count = _valid(pc.list_flatten(array))
    if types.is_map(kind):
        return pa.MapArray.from_arrays(offsets, *values.flatten(), type=kind, mask=absent), count
    if types.is_fixed_size_list(kind):
        lists = pa.ListArray.from_arrays(offsets, values, pa.list_(kind.value_field), mask=absent)
        return lists.cast(kind), count
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        made = pa.ListViewArray if types.is_list_view(kind) else pa.LargeListViewArray
        return made.from_arrays(offsets[:-1], lengths, values, type=kind, mask=absent), count
    made = pa.ListArray if types.is_list(kind) else pa.LargeListArray
    return made.from_arrays(offsets, values, type=kind, mask=absent), count


def _text(array: pa.Array) -> tuple[pa.Array, int]:
    count, values = 0, array.cast(pa.large_binary()).to_pylist()
    for i, value in enumerate(values):
        if value is not None:
            values[i] = value.decode(errors="replace")
            count += values[i].encode() != value
    return pa.array(values, array.type), count
