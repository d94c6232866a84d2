#!/usr/bin/env bash
# The Hugging Face Hub takes a folder of Parquet files as a data set when a README.md lies in it, and datasets 5.2.0
# loads such a folder. pyarrow 26.0.1, pandas 3.1.1 and polars 2.1.0 refuse the same folder by its name: pyarrow takes
# README.md for a Parquet file that is damaged, polars for a file of another format. So a folder that was pulled from the
# Hub is not one that these can read, and one that they read loses that by being described.
# Guess written down before: pyarrow and pandas fail, polars and datasets read the folder. polars fails too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 datasets==5.2.0
cd "$folder"
cat > read.py <<'PYTHON'
from pathlib import Path

import datasets
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq

READERS = {
    "pyarrow": lambda: pq.read_table("rows").num_rows,
    "pandas": lambda: len(pandas.read_parquet("rows")),
    "polars": lambda: polars.read_parquet("rows").height,
    "datasets": lambda: datasets.load_dataset("rows", cache_dir="cache")["train"].num_rows,
}


def read():
    found = {}
    for name, reader in READERS.items():
        try:
            found[name] = str(reader())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    return found


Path("rows").mkdir()
pq.write_table(pa.table({"a": [1, 2]}), "rows/part-000001.parquet")
assert set(read().values()) == {"2"}, "changed: without a README.md"
Path("rows/README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
found = read()
for name, result in found.items():
    print(f"{name}: {result}")
assert found["datasets"] == "2", "changed"
assert [name for name, result in found.items() if "Error" in result or "Invalid" in result] == ["pyarrow", "pandas", "polars"], "changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" read.py 2>/dev/null
