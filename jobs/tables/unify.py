"""Finding the one schema of several files whose columns differ, as pyarrow's permissive promotion does."""

from collections.abc import Collection, Iterable, Sequence

import pyarrow as pa

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.results.schema_notes import common_notes
from batchinfer.jobs.tables.input_file import InputFile


def unify(files: Sequence[InputFile], verbatim: Collection[str] = ()) -> pa.Schema:
    """Return the schema with all columns of all files; a column that is absent or null in one has another's type.

    A column in `verbatim` that differs becomes text, since a common type would change what some rows wrote.
    Its metadata has what all files note alike about columns of the same type.

    Raises `Refused`, naming file, column and both types, if no type holds a column's values of two files.
    """
    fields: dict[str, pa.Field] = {}
    for file in files:
        for found in _fields(file):
            fields[found.name] = (
                _common(files, file, fields[found.name], found, verbatim) if found.name in fields else found
            )
    absent = {name for name in fields for file in files if file.type_of(name) is None}
    unified = [field.with_nullable(field.nullable or name in absent) for name, field in fields.items()]
    notes = common_notes([file.schema for file in files], without=_promoted(files, fields))
    return pa.schema(unified, notes)


def promotions(files: Sequence[InputFile], schema: pa.Schema) -> list[str]:
    """Say of each column which type became which, and where it is absent; one line for each kind of difference."""
    found: dict[tuple[str, str], list[InputFile]] = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        for file in files:
            if file.num_rows and file.type_of(name) != kind:
                found.setdefault((name, str(file.type_of(name) or "")), []).append(file)
    return [
        f"column {name!r} is {before} in {_listed(those)}, and is read as {schema.field(name).type}, as in other files"
        if before
        else f"column {name!r} is absent in {_listed(those)}, whose rows have null in it"
        for (name, before), those in found.items()
    ]


def _promoted(files: Sequence[InputFile], fields: dict[str, pa.Field]) -> set[str]:
    return {
        name
        for name, field in fields.items()
        for file in files
        if file.type_of(name) not in (None, pa.null(), field.type)
    }


def _fields(file: InputFile) -> Iterable[pa.Field]:
    return [*file.schema, *(pa.field(name, value.type) for name, value in file.keys.items())]


def _common(
    files: Sequence[InputFile], file: InputFile, before: pa.Field, found: pa.Field, verbatim: Collection[str]
) -> pa.Field:
    if before.equals(found, check_metadata=True):
        return before
    if found.name in verbatim and pa.null() not in (before.type, found.type) and before.type != found.type:
        return pa.field(found.name, pa.string(), before.nullable or found.nullable)
    try:
        both = pa.unify_schemas([pa.schema([before]), pa.schema([found])], promote_options="permissive").field(0)
    except pa.ArrowException as error:
        first = next(other for other in files if other.type_of(found.name) not in (None, pa.null()))
        raise Refused(
            f"{file.path}: column {found.name!r} is {found.type}; expected {before.type}, as in {first.path}; give it "
            "one type in all files"
        ) from error
    # What a field's metadata says of one file's values, such as their categories, need not hold for another's.
    return both if before.metadata == found.metadata else both.remove_metadata()


def _listed(files: list[InputFile]) -> str:
    return f"{files[0].path}" + (f" and {count_of(len(files) - 1, 'more file')}" if len(files) > 1 else "")
