"""`Condition`: the expression of --where, which says for each row of a table whether it is taken.

The expression is parsed as Python and evaluated with pyarrow, as SQL would: a comparison with null is null, `and`, `or`
and `not` have three values, and a row whose condition is null is not taken. NaN equals nothing and is neither less nor
greater than a number.
"""

import ast
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.comparable import (
    MOST_DIGITS,
    Cast,
    cast_or_none,
    common_type,
    comparable,
    identity,
    scalar_of,
    whole_digits,
)
from batchinfer.jobs.tables.table import nearest

ALLOWED = (
    "allowed are comparisons (==, !=, <, <=, >, >=), in with a list, is None, and, or, not, names of columns, "
    "length(COLUMN), text in quotes, numbers, True and False"
)
MOST_LEVELS = 100  # of expressions within each other

Evaluate = Callable[[pa.RecordBatch], pa.Array]

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {  # names in pyarrow: as written, and with the sides exchanged
    ast.Eq: ("equal", "equal"),
    ast.NotEq: ("not_equal", "not_equal"),
    ast.Lt: ("less", "greater"),
    ast.LtE: ("less_equal", "greater_equal"),
    ast.Gt: ("greater", "less"),
    ast.GtE: ("greater_equal", "less_equal"),
}
_HOW_TO_WRITE = {
    "text": "text in quotes",
    "number": "a number without quotes",
    "boolean": "True or False",
    "date": "text, as '2024-05-01'",
    "time": "text, as '08:30'",
    "timestamp": "text, as '2024-05-01T08:30', with an offset as +02:00 if and only if the column has a time zone",
}


@dataclass(frozen=True)
class Condition:
    """A condition on rows."""

    columns: tuple[str, ...]  # that it needs
    _evaluate: Evaluate

    @staticmethod
    def read(text: str, schema: pa.Schema, file: Path) -> "Condition":
        """Parse an expression about the columns of a table, whose first file is `file`.

        Raises `UsageError` for what is not allowed in an expression, with its place, and `Refused`, naming column and
        type, if a column is missing or is compared with what it cannot equal.
        """
        reader = _Reader(text, schema, file)
        evaluate = reader.condition(reader.parse())
        return Condition(tuple(reader.columns), evaluate)

    def holds(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """Return whether the condition is true for each row [rows]; it is not where it is null. The batch has at least
        `columns`."""
        return pc.fill_null(self._evaluate(batch), False)


@dataclass(frozen=True)
class _Operand:
    """A column, or the length of its text: what values are compared."""

    column: str
    shown: str  # its name and type, in messages
    type: pa.DataType  # of the values that `plain` makes of the column's
    plain: Callable[[pa.Array], pa.Array]
    kind: str | None  # as `comparable` names it

    def mapped(self, batch: pa.RecordBatch, function: Callable[[pa.Array], pa.Array]) -> pa.Array:
        """Return what a function makes of the values, [rows]. Values in a dictionary are looked at once."""
        column = batch.column(self.column)
        if pa.types.is_dictionary(column.type):
            return function(self.plain(column.dictionary)).take(column.indices)
        return function(self.plain(column))

    def values(self, batch: pa.RecordBatch) -> pa.Array:
        return self.mapped(batch, lambda values: values)


class _Reader:
    """Makes functions of batches from the nodes of an expression. `columns` are those that were named so far."""

    def __init__(self, text: str, schema: pa.Schema, file: Path) -> None:
        self._text = text.strip()
        self._schema = schema
        self._file = file
        self.columns: dict[str, None] = {}

    def parse(self) -> ast.expr:
        try:
            tree = ast.parse(self._text, mode="eval").body
            level: list[ast.AST] = [tree]
            for _ in range(MOST_LEVELS):
                level = [child for node in level for child in ast.iter_child_nodes(node)]
        except SyntaxError as error:
            at = f" at character {error.offset}" if error.offset else ""
            raise UsageError(f"--where is no expression: {error.msg}{at}{self._about_names()}; {ALLOWED}") from error
        except ValueError as error:  # a NUL character, or text that is not UTF-8
            raise UsageError(f"--where is no expression: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise UsageError(f"--where is nested too deep; at most {MOST_LEVELS} levels are taken") from error
        if level:
            raise UsageError(f"--where is nested too deep; at most {MOST_LEVELS} levels are taken")
        return tree

    def condition(self, node: ast.expr) -> Evaluate:
        """Return the function that gives booleans and nulls [rows]."""
        match node:
            case ast.BoolOp(op=op, values=values):
                return _joined([self.condition(value) for value in values], isinstance(op, ast.And))
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                negated = self.condition(inner)
                return lambda batch: pc.invert(negated(batch))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = pairwise([left, *others])
                return _joined([self._compared(a, op, b) for (a, b), op in zip(sides, ops, strict=True)], True)
            case ast.Name():
                operand = self._operand(node)
                if operand.kind not in ("boolean", "null"):
                    raise Refused(
                        f"--where takes {operand.shown}, for true or false{self._at(node)}; compare it with something"
                    )
                return lambda batch: operand.values(batch).cast(pa.bool_())
        raise self._not_allowed(node)

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Evaluate:
        match op:
            case ast.Is() | ast.IsNot():
                return self._is_null(left, right, isinstance(op, ast.Is))
            case ast.In() | ast.NotIn():
                among = self._among(left, right)
                return among if isinstance(op, ast.In) else lambda batch: pc.invert(among(batch))
        if _is_operand(left) and _is_operand(right):
            return self._both(self._operand(left), op, self._operand(right), right)
        written, exchanged = _COMPARISONS[type(op)]
        if _is_operand(left):
            return self._with_literal(self._operand(left), written, right)
        if _is_operand(right):
            return self._with_literal(self._operand(right), exchanged, left)
        raise self._not_allowed(left if not _is_literal(left) else right, "; one side must be a column")

    def _is_null(self, left: ast.expr, right: ast.expr, wanted: bool) -> Evaluate:
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise self._not_allowed(right, "; after is, only None and not None can stand")
        operand = self._operand(left)

        # A dictionary's index may be null, which no value tells.
        def known(batch: pa.RecordBatch) -> pa.Array:
            return pc.fill_null(operand.mapped(batch, lambda values: values.is_valid()), False)

        return (lambda batch: pc.invert(known(batch))) if wanted else known

    def _among(self, left: ast.expr, right: ast.expr) -> Evaluate:
        if not isinstance(right, ast.List | ast.Tuple):
            raise self._not_allowed(right, "; after in, give a list of literals, as ['a', 'b']")
        operand = self._operand(left)
        literals = [self._literal(operand, element) for element in right.elts]
        if operand.kind == "null":
            return _nulls
        # A literal that the column's type cannot hold equals none of its values.
        held = (cast_or_none(literal, operand.type) for literal in literals)
        wanted = pa.array([literal for literal in held if literal is not None], operand.type)

        def among(values: pa.Array) -> pa.Array:
            return pc.if_else(values.is_valid(), pc.is_in(values, value_set=wanted), pa.scalar(None, pa.bool_()))

        return lambda batch: operand.mapped(batch, among)

    def _with_literal(self, operand: _Operand, comparison: str, node: ast.expr) -> Evaluate:
        literal = self._literal(operand, node)
        if operand.kind == "null":
            return _nulls
        self._refuse_order(operand, comparison, node)
        ours, theirs = self._common(operand.type, literal.type, node)
        compare = getattr(pc, comparison)
        return lambda batch: operand.mapped(batch, lambda values: compare(ours(values), theirs(literal)))

    def _both(self, a: _Operand, op: ast.cmpop, b: _Operand, node: ast.expr) -> Evaluate:
        if "null" in (a.kind, b.kind):
            return _nulls
        if a.kind is None or a.kind != b.kind or (a.kind not in ("number", "text") and a.type != b.type):
            raise Refused(f"--where compares {a.shown}, with {b.shown},{self._at(node)}; compare columns of one kind")
        self._refuse_order(a, _COMPARISONS[type(op)][0], node)
        ours, theirs = self._common(a.type, b.type, node)
        compare = getattr(pc, _COMPARISONS[type(op)][0])
        return lambda batch: compare(ours(a.values(batch)), theirs(b.values(batch)))

    def _refuse_order(self, operand: _Operand, comparison: str, node: ast.expr) -> None:
        if operand.kind == "boolean" and comparison not in ("equal", "not_equal"):
            raise Refused(
                f"--where asks for the order of {operand.shown},{self._at(node)}; write {operand.column}, or "
                f"not {operand.column}"
            )

    def _operand(self, node: ast.expr) -> _Operand:
        match node:
            case ast.Name():
                column, shown = self._column(node)
                kind, plain_type, plain = comparable(column.type)
                return _Operand(column.name, shown, plain_type, plain, kind)
            case ast.Call(func=ast.Name(id="length"), args=[ast.Name() as named], keywords=[]):
                column, shown = self._column(named)
                kind, _, plain = comparable(column.type)
                if kind not in ("text", "null"):
                    raise Refused(f"--where asks for the length of {shown},{self._at(node)}; only text has a length")
                shown = f"length({column.name}), which is a whole number"
                if kind == "null":
                    return _Operand(column.name, shown, pa.null(), plain, kind)
                return _Operand(column.name, shown, pa.int64(), lambda v: pc.utf8_length(plain(v)), "number")
        raise self._not_allowed(node)

    def _column(self, node: ast.Name) -> tuple[pa.Field, str]:
        name = self._source(node)  # Python would change letters of some names, as in a ligature
        if name not in self._schema.names:
            near = nearest(name, self._schema.names)
            if near is None:
                known = f"its columns are {', '.join(map(repr, self._schema.names))}"
            elif near.isidentifier():
                known = f"did you mean {near!r}?"
            else:
                known = f"rename {near!r} to letters, digits and _ if you mean it"
            raise Refused(f"--where names {name!r}{self._at(node)}, but {self._file} has no such column; {known}")
        self.columns[name] = None
        return self._schema.field(name), f"column {name!r}, which is {self._schema.field(name).type}"

    def _literal(self, operand: _Operand, node: ast.expr) -> pa.Scalar:
        """Return a literal as a value to compare the operand's with."""
        if not _is_literal(node):
            raise self._not_allowed(node)
        value, source = ast.literal_eval(node), self._source(node)
        if value is None:
            raise UsageError(f"--where compares with None{self._at(node)}; write 'is None' or 'is not None'")
        if operand.kind == "null":
            return pa.scalar(value)
        if operand.kind is None:
            raise Refused(
                f"--where compares {operand.shown},{self._at(node)}; of such a column it can only be asked whether it "
                "is None"
            )
        try:
            literal = scalar_of(value, operand.kind, operand.type)
        except (ValueError, OverflowError, ArithmeticError, pa.ArrowException):
            literal = None
        if literal is None:
            many_digits = operand.kind == "number" and not isinstance(value, str | bool)
            remedy = f"a number of at most {MOST_DIGITS} digits" if many_digits else _HOW_TO_WRITE[operand.kind]
            raise Refused(f"--where compares {operand.shown}, with {source[:80]}{self._at(node)}; write {remedy}")
        return literal

    def _common(
        self, a: pa.DataType, b: pa.DataType, node: ast.expr
    ) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Return functions that bring values of two comparable types to one in which they are compared."""
        kind = common_type(a, b)
        for own in (a, b):
            if kind is not None and pa.types.is_decimal256(kind) and whole_digits(own) + kind.scale > MOST_DIGITS:
                raise Refused(
                    f"--where compares numbers of too many digits{self._at(node)}; at most {MOST_DIGITS} are compared"
                )
        one, two = (identity if kind in (None, own) else Cast(kind) for own in (a, b))
        return one, two

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text, node) or ""

    def _at(self, node: ast.expr) -> str:
        lines = self._text.encode().split(b"\n")
        before = b"\n".join([*lines[: node.lineno - 1], lines[node.lineno - 1][: node.col_offset]])
        return f" at character {len(before.decode()) + 1}"

    def _about_names(self) -> str:
        """Return which columns the expression may name that no expression can name; or nothing."""
        names = [name for name in self._schema.names if keyword.iskeyword(name) or not name.isidentifier()]
        named = next((name for name in names if name and name in self._text), None)
        return "" if named is None else f" (a column that is called {named!r} cannot be named here; rename it)"

    def _not_allowed(self, node: ast.expr, more: str = "") -> UsageError:
        return UsageError(
            f"--where has {self._source(node)[:80]!r}{self._at(node)}, which is not allowed there{more}; {ALLOWED}"
        )


def _nulls(batch: pa.RecordBatch) -> pa.Array:
    return pa.nulls(len(batch), pa.bool_())


def _joined(parts: Sequence[Evaluate], both: bool) -> Evaluate:
    join = pc.and_kleene if both else pc.or_kleene
    return lambda batch: reduce(join, (part(batch) for part in parts))


def _is_operand(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Call)


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = node.operand
        return isinstance(inner, ast.Constant) and type(inner.value) in (int, float)
    return isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (str, int, float, bool))
