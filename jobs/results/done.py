"""Reading the parts of a run: which rows are done, how they ended, and their token counts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchinfer.errors import Refused
from batchinfer.host.files import sha256
from batchinfer.jobs.results.schema import ROW, SAMPLES, counted, has_samples, is_part


@dataclass(frozen=True)
class Part:
    """A committed part, as the manifest lists it."""

    name: str
    rows: int
    first_row: int
    last_row: int
    finish_reasons: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, table: pa.Table, size: int, digest: str) -> "Part":
        """Describe a part file: its rows (one or more, ascending), its size in bytes and its sha256."""
        return cls(
            name=name,
            rows=len(table),
            first_row=table[ROW][0].as_py(),
            last_row=table[ROW][-1].as_py(),
            finish_reasons=dict(counts(table["finish_reason"])),
            prompt_tokens=pc.sum(table["prompt_tokens"]).as_py() or 0,
            completion_tokens=completion_tokens(table),
            bytes=size,
            sha256=digest,
        )

    def listed(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        return asdict(self)


@dataclass
class Done:
    """The rows that need not run any more, and counts over them. If a row is in several parts, the last one counts."""

    rows: NDArray[np.bool_]  # [rows of the input]
    by_reason: Counter[str] = field(default_factory=Counter)
    by_error: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0  # rows with an error that will run again; not counted as done
    parts: list[Part] = field(default_factory=list)
    engines: set[str] = field(default_factory=set)  # fingerprints of the engines that computed the rows

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    @property
    def complete(self) -> bool:
        return bool(self.rows.all())


def read_done(folder: Path, num_rows: int, fingerprints: dict[str, str], retry_errors: bool) -> Done:
    """Read the parts of a run, newest first.

    Raises `Refused` if a part belongs to another job, and `OSError` if a part is damaged.
    """
    done = Done(np.zeros(num_rows, np.bool_))
    seen = np.zeros(num_rows, np.bool_)
    for path in sorted(folder.glob("part-*.parquet"), reverse=True):
        table, written_as = read_part(path)
        if (differing := differences(written_as, fingerprints)) or table[ROW][-1].as_py() >= num_rows:
            raise Refused(
                f"part {path} belongs to a job with another {' and '.join(differing) or 'input'}; move it away"
            )
        done.parts.insert(0, Part.of(path.name, table, path.stat().st_size, sha256(path)))
        done.engines.add(written_as.get("engine", ""))
        rows = table[ROW].to_numpy()
        fresh = ~seen[rows]
        seen[rows] = True
        again = pc.equal(table["finish_reason"], "error").to_numpy() & retry_errors
        done.failed += int((fresh & again).sum())
        table = table.filter(pa.array(fresh & ~again))
        done.rows[table[ROW].to_numpy()] = True
        done.by_reason.update(counts(table["finish_reason"]))
        done.by_error.update(counts(table["error_code"]))
        done.prompt_tokens += pc.sum(table["prompt_tokens"]).as_py() or 0
        done.completion_tokens += completion_tokens(table)
    return done


def read_part(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Return (the part's columns that are counted, the fingerprints in its footer). Raises `OSError` if it is
    damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            if not is_part(file.schema_arrow):
                raise OSError(f"part {path} is damaged: its columns are not those of a part; {REMEDY}")
            metadata = (file.schema_arrow.metadata or {}).get(b"batchinfer", b"{}")
            table = file.read([ROW, *counted(file.schema_arrow)], use_threads=False)
            if not len(table):
                raise OSError(f"part {path} is damaged: it has no rows; {REMEDY}")
            return table, json.loads(metadata)
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or REMEDY in str(error)):
            raise
        raise OSError(f"part {path} is damaged: {str(error).splitlines()[0]}; {REMEDY}") from error


REMEDY = "remove it, and its rows are computed again"


def completion_tokens(results: pa.Table | pa.RecordBatch) -> int:
    """Sum the completion tokens over all samples of all rows; a row without samples counts its own."""
    if not has_samples(results.schema):
        return pc.sum(results["completion_tokens"]).as_py() or 0
    without = results["completion_tokens"].filter(pc.is_null(results[SAMPLES]))
    of_samples = pc.struct_field(pc.list_flatten(results[SAMPLES]), "completion_tokens")
    return (pc.sum(without).as_py() or 0) + (pc.sum(of_samples).as_py() or 0)


def counts(column: pa.ChunkedArray) -> Counter[str]:
    """Count how often each value occurs; nulls are not counted."""
    return Counter({pair["values"].as_py(): pair["counts"].as_py() for pair in pc.value_counts(column.drop_null())})


def in_words(differing: Sequence[str]) -> str:
    """Name what differs between two jobs; the template's fingerprint has all that prompts are made of."""
    words = {"template": "template, column or flag for prompts or ids"}
    return " and ".join(words.get(name, name) for name in differing)


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Return the names of the fingerprints that differ between two jobs. The engine is left out, since it may
    differ."""
    return [name for name in sorted({*a, *b} - {"engine"}) if a.get(name) != b.get(name)]
