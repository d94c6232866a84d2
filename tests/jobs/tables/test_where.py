"""`--where` selects the rows that DuckDB selects; what it does not know, and what cannot be compared, is refused."""

from datetime import UTC, date, datetime
from decimal import Decimal
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.where import Condition

FILE = Path("in.parquet")
WORDS = [None, "", "de", "en", "é", "eé", "zz", "\u6f22\u5b57", "\U0001f600"]
NUMBERS = [None, -(1 << 63), -2, -1, 0, 1, 2, 3, 1 << 53, (1 << 53) + 1, (1 << 63) - 1]
SMALL = [None, -2, -1, 0, 1, 2, 3, 127, -128]
FLOATS = [None, -1.5, 0.0, 0.1, 1.0, 2.5, 1e300]
MONEY = [None, *map(Decimal, ["-1.50", "0.00", "0.10", "1.00", "2.50"])]
DAYS = [None, date(2024, 4, 30), date(2024, 5, 1), date(2025, 1, 1)]

COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "word": (pa.string(), WORDS),
    "large": (pa.large_string(), WORDS),
    "view": (pa.string_view(), WORDS),
    "category": (pa.dictionary(pa.int8(), pa.string()), WORDS),
    "big": (pa.int64(), NUMBERS),
    "small": (pa.int8(), SMALL),
    "real": (pa.float64(), FLOATS),
    "money": (pa.decimal128(10, 2), MONEY),
    "flag": (pa.bool_(), [None, True, False]),
    "other": (pa.bool_(), [None, True, False]),
    "day": (pa.date32(), DAYS),
}
TEXTS, WHOLE = ("word", "large", "view", "category"), ("big", "small")


def table_of(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    arrays = [pa.array(values, kind) for values, (kind, _) in zip(columns, COLUMNS.values(), strict=True)]
    return pa.record_batch(arrays, list(COLUMNS))


def quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def literal_for(column: str) -> st.SearchStrategy[str]:
    values = [value for value in COLUMNS[column][1] if value is not None]
    if column == "day":
        return st.sampled_from([f"'{day}'" for day in values])
    if column in WHOLE:
        return st.sampled_from([*map(str, values), "1.0", "1000", "-1000", "0.5"])
    return st.sampled_from([*map(quoted, values)])


@st.composite
def comparison(draw: st.DrawFn) -> tuple[str, str]:
    """The same comparison in Python and in SQL."""
    column = draw(st.sampled_from([*COLUMNS]))
    form = draw(st.sampled_from(["literal", "turned", "chain", "in", "none", "length", "column"]))
    if form == "none":
        sign = draw(st.sampled_from(["is", "is not"]))
        return f"{column} {sign} None", f"{column} {sign} NULL"
    if column in ("flag", "other"):
        if form == "literal":
            sign, value = draw(st.sampled_from(["==", "!="])), draw(st.sampled_from(["True", "False"]))
            return f"{column} {sign} {value}", f"{column} {sign} {value}"
        return column, column
    name, sql = column, column
    if form == "length" and column in TEXTS:
        name, sql, column = f"length({column})", f"length({column})", "small"
    literal, sign = draw(literal_for(column)), draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]))
    if form == "turned":
        return f"{literal} {sign} {name}", f"{in_sql(literal)} {sign} {sql}"
    if form == "chain":
        low, high = draw(literal_for(column)), draw(literal_for(column))
        return f"{low} <= {name} < {high}", f"({in_sql(low)} <= {sql} AND {sql} < {in_sql(high)})"
    if form == "in":
        literals = draw(st.lists(literal_for(column), min_size=1, max_size=3))
        word, shown = draw(st.sampled_from(["in", "not in"])), ", ".join(literals)
        return f"{name} {word} [{shown}]", f"{sql} {word} ({', '.join(map(in_sql, literals))})"
    if form == "column":
        alike = next(each for each in (TEXTS, WHOLE, ("real",), ("money",), ("day",)) if column in each)
        other = draw(st.sampled_from(alike))
        return f"{column} {sign} {other}", f"{column} {sign} {other}"
    return f"{name} {sign} {literal}", f"{sql} {sign} {in_sql(literal)}"


def in_sql(literal: str) -> str:
    return literal if literal[0] == "'" or "e" in literal else f"CAST('{literal}' AS DECIMAL(38, 2))"


def joined(parts: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    both = st.tuples(parts, st.sampled_from(["and", "or"]), parts)
    return st.one_of(
        both.map(lambda three: tuple(f"({three[0][i]}) {three[1]} ({three[2][i]})" for i in (0, 1))),
        parts.map(lambda part: (f"not ({part[0]})", f"NOT ({part[1]})")),
    )


EXPRESSIONS = st.recursive(comparison(), joined, max_leaves=6)
ROWS = st.lists(st.tuples(*(st.sampled_from(values) for _, values in COLUMNS.values())), max_size=12)


@pytest.fixture(scope="module")
def database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, expression=EXPRESSIONS)
def test_the_rows_of_random_expressions_are_those_of_duckdb(
    database: duckdb.DuckDBPyConnection, rows: list[tuple[Any, ...]], expression: tuple[str, str]
) -> None:
    python, sql = expression
    batch = table_of(rows)
    table = pa.Table.from_batches([batch]).append_column("i", pa.array(range(len(batch)), pa.int64()))
    database.register("rows_", table)
    expected = [row for (row,) in database.execute(f"SELECT i FROM rows_ WHERE {sql} ORDER BY i").fetchall()]
    holds = Condition.read(python, batch.schema, FILE).holds(batch)
    assert holds.null_count == 0
    assert [i for i, held in enumerate(holds.to_pylist()) if held] == expected, (python, sql)


def selects(expression: str, kind: pa.DataType, values: list[Any]) -> list[bool]:
    batch = pa.record_batch([pa.array(values, kind)], ["x"])
    held: list[bool] = Condition.read(expression, batch.schema, FILE).holds(batch).to_pylist()
    return held


@pytest.mark.parametrize("sign", ["==", "!=", "<", "<=", ">", ">="])
def test_a_literal_may_stand_on_either_side(sign: str) -> None:
    values = [1, 2, 3]
    compare = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}[sign]
    assert selects(f"x {sign} 2", pa.int64(), values) == [compare(x, 2) for x in values]
    assert selects(f"2 {sign} x", pa.int64(), values) == [compare(2, x) for x in values]


BERLIN = pa.timestamp("us", "Europe/Berlin")
MOMENT = datetime(2024, 5, 1, 6, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "kind", "values", "expected"),
    [
        ("x == 0.1", pa.float32(), [0.1, 0.2, None], [True, False, False]),
        ("x < 1.5", pa.float16(), [1, 2], [True, False]),
        ("x == 9007199254740993", pa.int64(), [1 << 53, (1 << 53) + 1], [False, True]),
        ("x == 9007199254740992.0", pa.int64(), [1 << 53, (1 << 53) + 1], [True, False]),
        ("x > -1", pa.uint64(), [0, (1 << 64) - 1], [True, True]),
        ("x >= 18446744073709551615", pa.uint64(), [0, (1 << 64) - 1], [False, True]),
        ("x < 1000000000000000000000", pa.int8(), [1, None], [True, False]),
        ("x in [1, 1000, 1.5, 2.0]", pa.int8(), [1, 2, 3, None], [True, True, False, False]),
        ("x not in [1, 1000]", pa.int8(), [1, 2, None], [False, True, False]),
        ("x not in []", pa.int8(), [1, None], [True, False]),
        ("x == 0.10", pa.decimal128(5, 1), [Decimal("0.1"), Decimal("0.2")], [True, False]),
        ("x < 0.105", pa.decimal32(5, 1), [Decimal("0.1"), Decimal("0.2")], [True, False]),
        ("x in (0.1, 0.15)", pa.decimal64(5, 1), [Decimal("0.1"), Decimal("0.2")], [True, False]),
        ("x == 1", pa.float64(), [1.0, float("nan")], [True, False]),
        ("x != 1", pa.float64(), [1.0, float("nan")], [False, True]),
        ("x < 1e999", pa.int64(), [1], [True]),
        ("x >= '08:30'", pa.time32("s"), [8 * 3600, 8 * 3600 + 1800], [False, True]),
        (
            "x < '2024-05-01T08:00'",
            pa.timestamp("ms"),
            [datetime(2024, 5, 1, 7), datetime(2024, 5, 1, 8)],
            [True, False],
        ),
        ("x == '2024-05-01'", pa.timestamp("s"), [datetime(2024, 5, 1)], [True]),
        ("x == '2024-05-01T08:00+02:00'", BERLIN, [MOMENT], [True]),
        ("x == '2024-05-01'", pa.date64(), [date(2024, 5, 1)], [True]),
        ("x is None", pa.list_(pa.int8()), [[1], None], [False, True]),
        ("x is not None", pa.struct([("a", pa.int8())]), [{"a": None}, None], [True, False]),
        ("x is None or x > 1", pa.null(), [None], [True]),
        ("not x == 'a'", pa.null(), [None], [False]),
        (
            "length(x) == 2",
            pa.dictionary(pa.int8(), pa.large_string()),
            ["\u6f22\u5b57", "a", None],
            [True, False, False],
        ),
        ("length(x) is None", pa.string(), ["", None], [False, True]),
        ("x == 2", pa.dictionary(pa.int8(), pa.int64()), [1, 2], [False, True]),
        ('x == "it\'s"', pa.string(), ["it's", "its"], [True, False]),
        (" x == 'a' 'b'", pa.string(), ["ab"], [True]),
    ],
)
def test_types_are_compared_as_users_expect(
    expression: str, kind: pa.DataType, values: list[Any], expected: list[bool]
) -> None:
    assert selects(expression, kind, values) == expected


def test_a_null_in_the_values_of_a_dictionary_is_null() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), pa.array(["a", None]))
    batch = pa.record_batch([column], ["x"])
    assert Condition.read("x is None", batch.schema, FILE).holds(batch).to_pylist() == [False, True, True]
    assert Condition.read("x != 'b'", batch.schema, FILE).holds(batch).to_pylist() == [True, False, False]


def test_columns_of_other_number_types_are_compared_exactly() -> None:
    columns = {
        "signed": pa.array([-1, 1 << 62], pa.int64()), "unsigned": pa.array([(1 << 64) - 1, 1 << 62], pa.uint64()),
        "price": pa.array([Decimal("-1.00"), Decimal("0.50")], pa.decimal128(30, 2)),
    }  # fmt: skip
    batch = pa.record_batch(columns)
    for expression, expected in [
        ("signed < unsigned", [True, False]), ("signed == unsigned", [False, True]), ("signed == price", [True, False]),
    ]:  # fmt: skip
        assert Condition.read(expression, batch.schema, FILE).holds(batch).to_pylist() == expected


SCHEMA = pa.schema(
    {
        "stars": pa.int64(), "review": pa.string(), "good": pa.bool_(), "day": pa.date32(), "at": BERLIN,
        "tags": pa.list_(pa.string()), "raw": pa.binary(), "my column": pa.string(), "price": pa.decimal256(76, 10),
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "--where is no expression: invalid syntax"),
        ("stars = 3", "--where is no expression: invalid syntax"),
        ("stars > 3 3", "at character 11"),
        ("my column == 'a'", "a column that is called 'my column' cannot be named here; rename it"),
        ("stars + 1 > 3", "'stars + 1' at character 1, which is not allowed there"),
        ("review == 'a' and upper(review) == 'B'", "'upper(review)' at character 19, which is not allowed"),
        ("review == f'{stars}'", "at character 11, which is not allowed"),
        ("__import__('os').system('id')", "is not allowed there"),
        ("[x for x in stars]", "is not allowed there"),
        ("stars if good else good", "is not allowed there"),
        ("(lambda: good)()", "is not allowed there"),
        ("review[0] == 'a'", "'review[0]' at character 1"),
        ("1 < 2", "one side must be a column"),
        ("True", "'True' at character 1, which is not allowed there"),
        ("'a' in review", "after in, give a list of literals"),
        ("stars in [1, None]", "compares with None at character 14; write 'is None'"),
        ("stars == None", "write 'is None' or 'is not None'"),
        ("stars is 3", "after is, only None and not None can stand"),
        ("length(review, 1) > 2", "is not allowed there"),
        ("length('abc') > 2", "is not allowed there"),
        ("stars == b'a'", "is not allowed there"),
        ("stars == 2j", "is not allowed there"),
        ("not " * 200 + "good", "nested too deep"),
        ("(" * 5000 + "good" + ")" * 5000, "--where is"),
        ("stars == " + "9" * 5000, "--where is no expression"),
        ("review == '\ud800'", "--where is no expression"),
        ("good\0", "--where is no expression"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(expression: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Condition.read(expression, SCHEMA, FILE)
    assert said in str(refused.value) and "--where" in str(refused.value)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("star > 3", "names 'star' at character 1, but in.parquet has no such column; did you mean 'stars'?"),
        ("my_column > 3", "no such column; rename 'my column' to letters, digits and _ if you mean it"),
        ("zzz is None", "its columns are 'stars', 'review'"),
        ("stars == '3'", "column 'stars', which is int64, with '3' at character 10; write a number without quotes"),
        (
            "'é' == review and review > 3",
            "column 'review', which is string, with 3 at character 28; write text in quotes",
        ),
        ("good == 1", "column 'good', which is bool, with 1 at character 9; write True or False"),
        ("stars == True", "which is int64, with True"),
        ("good < True", "asks for the order of column 'good', which is bool, at character 8; write good, or not good"),
        ("stars and good", "takes column 'stars', which is int64, for true or false at character 1"),
        ("day < '2024-13-01'", "which is date32[day], with '2024-13-01' at character 7; write text, as '2024-05-01'"),
        ("day < 2024", "write text, as '2024-05-01'"),
        ("at < '2024-05-01T08:00'", "with an offset as +02:00 if and only if the column has a time zone"),
        ("tags == 'a'", "column 'tags', which is list<item: string>, at character 9; of such a column"),
        ("raw == 'a'", "which is binary, at character 8; of such a column it can only be asked whether it is None"),
        ("length(tags) > 1", "asks for the length of column 'tags', which is list<item: string>, at character 1"),
        ("stars == review", "compares column 'stars', which is int64, with column 'review', which is string"),
        ("day == at", "compare columns of one kind"),
        ("price < 1e-20", "too many digits"),
        ("stars < 1" + "0" * 90, "write a number of at most 76 digits"),
    ],
)
def test_what_does_not_fit_the_table_is_refused_by_name(expression: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        Condition.read(expression, SCHEMA, FILE)
    assert said in str(refused.value)


def test_the_columns_that_are_needed_are_known() -> None:
    condition = Condition.read("good and length(review) > 3 and stars < 2 and stars > 0", SCHEMA, FILE)
    assert condition.columns == ("good", "review", "stars")
