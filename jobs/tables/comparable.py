"""Values that can be compared: of which kind a column's type is, and in which type two kinds of numbers meet."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.jobs.tables.ids import as_text

MOST_DIGITS = 76  # of numbers that are compared as decimals


@dataclass(frozen=True)
class Cast:
    """Converts arrays and scalars to a type; those that become floats are rounded."""

    kind: pa.DataType

    def __call__(self, values: Any) -> Any:
        return pc.cast(values, self.kind, safe=not pa.types.is_floating(self.kind))


def identity(values: Any) -> Any:
    """Return the values themselves."""
    return values


def comparable(kind: pa.DataType) -> tuple[str | None, pa.DataType, Callable[[pa.Array], pa.Array]]:
    """Return the kind of a type, the type in which its values are compared, and the function that makes it of them.

    The kind is text, number, boolean, date, time, timestamp, null, or None for types that are not compared. A
    dictionary's type is that of its values.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return comparable(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text", pa.large_string(), as_text  # pyarrow compares no string views
    if types.is_float16(kind):
        return "number", pa.float32(), Cast(pa.float32())
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        wider = pa.decimal128(kind.precision, kind.scale)
        return "number", wider, Cast(wider)
    kinds = {
        "null": (types.is_null,),
        "boolean": (types.is_boolean,),
        "number": (types.is_integer, types.is_floating, types.is_decimal),
        "date": (types.is_date,),
        "time": (types.is_time,),
        "timestamp": (types.is_timestamp,),
    }
    return next((name for name, tests in kinds.items() if any(test(kind) for test in tests)), None), kind, identity


def scalar_of(value: Any, kind: str, wanted: pa.DataType) -> pa.Scalar | None:
    """Return a Python literal as a value of a kind; None if it is of another. Raises if the type cannot hold it."""
    if isinstance(value, bool):
        return pa.scalar(value) if kind == "boolean" else None
    if isinstance(value, int | float):
        return number_of(value, wanted) if kind == "number" else None
    if kind == "text":
        return pa.scalar(value, pa.large_string())
    if kind in ("date", "timestamp"):
        return pa.scalar(value).cast(wanted)
    if kind == "time":
        moment = pa.scalar(time.fromisoformat(value), wanted)
        return moment if moment.as_py() == time.fromisoformat(value) else None
    return None


def number_of(value: int | float, wanted: pa.DataType) -> pa.Scalar:
    """Return a number to compare values of a type with. Beside floats it is rounded to their type; else it is exact."""
    if pa.types.is_floating(wanted):
        return pa.scalar(float(value), wanted)
    if pa.types.is_integer(wanted):
        if isinstance(value, float) and not value.is_integer():
            return pa.scalar(value)  # no integer that rounds when it is made a float is near enough to matter
        least, most = (0, 1 << 64) if wanted == pa.uint64() else (-(1 << 63), 1 << 63)
        if least <= int(value) < most:
            return pa.scalar(int(value), pa.uint64() if wanted == pa.uint64() else pa.int64())
    exact = Decimal(str(value))
    scale = max(0, -int(exact.as_tuple().exponent), wanted.scale if pa.types.is_decimal(wanted) else 0)
    return pa.scalar(exact, pa.decimal256(MOST_DIGITS, scale))


def cast_or_none(literal: pa.Scalar, kind: pa.DataType) -> pa.Scalar | None:
    """Return a value in another type; None if that type cannot hold it."""
    try:
        return literal.cast(kind)
    except pa.ArrowInvalid:
        return None


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the type in which values of two types of one kind are compared; None if pyarrow compares them as they are.

    Integers are compared exactly with integers and decimals, and as float64 with floats.
    """
    if a == b or "number" not in (comparable(a)[0], comparable(b)[0]):
        return None
    if pa.types.is_floating(a) or pa.types.is_floating(b):
        return pa.float64()
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        signed = pa.types.is_signed_integer(a) or pa.types.is_signed_integer(b)
        if not (signed and pa.uint64() in (a, b)):
            return None
    return pa.decimal256(MOST_DIGITS, max(getattr(a, "scale", 0), getattr(b, "scale", 0), 0))


def whole_digits(kind: pa.DataType) -> int:
    """Return how many digits before the point numbers of an integer's or a decimal's type may have."""
    return int(kind.precision - kind.scale) if pa.types.is_decimal(kind) else 20
