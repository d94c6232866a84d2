#!/usr/bin/env bash
# In pyarrow 26.0.1, a column of type arrow.json whose storage is string_view is cast to string without an error, and the
# result is not UTF-8 text: its bytes are not those of the values. Casting the storage gives the values.
# Guess written down before: both give the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import pyarrow as pa

values = ['{"a": 1}', '{"text": "longer than the twelve bytes that a view holds itself"}']
column = pa.ExtensionArray.from_storage(pa.json_(pa.string_view()), pa.array(values, pa.string_view()))
assert column.storage.cast(pa.string()).to_pylist() == values
cast = column.cast(pa.string())
try:
    cast.validate(full=True)
    right = cast.to_pylist() == values
except (pa.ArrowInvalid, UnicodeDecodeError) as error:
    print(f"pyarrow {pa.__version__}: {type(error).__name__}: {str(error)[:80]!a}")
    right = False
assert not right, "changed: the cast gives the values"
PYTHON
