"""`Reuse`: the answers that earlier jobs of the same model and sampling have computed, found by answer keys."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchinfer.engine.config import FEW_ROWS
from batchinfer.engine.request import Requests
from batchinfer.errors import Refused
from batchinfer.jobs.results.output_writer import is_there
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files
from batchinfer.jobs.results.schema import KEY, ROW, part_schema
from batchinfer.jobs.rows.answer_keys import Keys, answer_keys
from batchinfer.jobs.rows.token_file import cut
from batchinfer.kernels.ragged import Ints

# What may differ between two jobs: it decides which prompts and seeds there are, and those are in the keys.
OF_ROWS = {
    "columns",
    "csv_delimiter",
    "csv_encoding",
    "format",
    "input",
    "selection",
    "shard",
    "template",
    "template_date",
}
FULL_NAMES = {
    "cpu_path": "--cpu-path, the kernels of a CPU",
    "engine": "version, device or --deterministic",
    "quantization": f"quantization, or number of rows (at most {FEW_ROWS}, or more)",
}
PART_BITS = 32  # a place is the part's number, and in the low bits the index of the row in it
TAKEN_ROWS = 4096  # answers that are read at a time, at most,
TAKEN_TOKENS = 1 << 20  # and their tokens


@dataclass(frozen=True, eq=False)
class Reuse:
    """The answers in the parts of earlier jobs: 24 bytes of memory for each."""

    _parts: list[Path]
    _keys: Keys  # [answers] ascending
    _places: NDArray[np.int64]  # [answers]

    @staticmethod
    def of(outputs: Sequence[Path], fingerprints: Mapping[str, str], results: Sequence[pa.Field]) -> "Reuse | None":
        """Find the answers in outputs of earlier jobs, for a job with these fingerprints and result columns.

        None without outputs. Raises `Refused`, naming the output, if it is of no run, of another model, tokenizer,
        sampling, quantization or engine, or not complete.
        """
        parts: list[Path] = []
        keys, places = [np.empty(0, f"S{KEY.type.byte_width}")], [np.empty(0, np.int64)]
        for given in outputs:
            for output in incremental_files(given) or [given]:
                for part in _parts_of(given, output, fingerprints):
                    found, indices = _answered(part, fingerprints, results)
                    keys.append(found)
                    places.append((len(parts) << PART_BITS) + indices)
                    parts.append(part)
        if not outputs:
            return None
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        return Reuse(parts, all_keys[order], np.concatenate(places)[order])

    def places(self, requests: Requests) -> Ints:
        """Return where the answer of each row is [n]; -1 if there is none."""
        if not len(self._keys):
            return np.full(len(requests), -1)
        keys = answer_keys(requests)
        near = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[near] == keys, self._places[near], -1)

    def answers(self, rows: Ints, places: Ints) -> Iterator[pa.RecordBatch]:
        """Yield the answers at places [n] as those of rows [n], in batches of `part_schema`, part by part.

        Raises `OSError` if a part is damaged.
        """
        order = np.argsort(places, kind="stable")
        rows, places = rows[order], places[order]
        ends = np.searchsorted(places, np.arange(len(self._parts) + 1) << PART_BITS)
        for number in np.flatnonzero(np.diff(ends)).tolist():
            mine = slice(ends[number], ends[number + 1])
            yield from _taken(self._parts[number], rows[mine], places[mine] - (number << PART_BITS))


def _parts_of(given: Path, output: Path, fingerprints: Mapping[str, str]) -> list[Path]:
    """Return the parts of a complete output, which is `given` or a file of it."""
    folder = RunFolder(output)
    remedy = "give the output of a complete run, with its run folder beside it; of merged shards, give the shards"
    try:
        before = json.loads((folder.path / "run.json").read_text("utf-8"))["fingerprints"]
        _refuse_others(output, before, fingerprints)
        if _at_work(RunFolder(given)) or _at_work(folder):
            raise Refused(f"--reuse {given}: a run is at work on it; try again when that has ended")
        if not is_there(output):
            raise Refused(f"--reuse {output}: there is no such output, or it is not complete; {remedy}")
        listed = json.loads(folder.manifest.read_text("utf-8"))["parts"]
        return [folder.parts / part["name"] for part in listed]
    except FileNotFoundError as error:
        raise Refused(f"--reuse {output}: there is no {error.filename}; {remedy}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"--reuse {output}: {folder.path} is damaged; leave this output out") from error


def _at_work(folder: RunFolder) -> bool:
    try:
        return folder.taken
    except PermissionError:  # who may only read cannot lock; a complete output is whole all the same
        return False


def _refuse_others(source: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    names = sorted({*before, *now} - OF_ROWS)
    if differing := [name for name in names if before.get(name) != now.get(name)]:
        what = " and ".join(FULL_NAMES.get(name, name) for name in differing)
        raise Refused(
            f"--reuse: {source} was computed with another {what}, so its answers are not those of this job; leave it "
            "out, or give the flags of that job"
        )


def _answered(part: Path, fingerprints: Mapping[str, str], results: Sequence[pa.Field]) -> tuple[Keys, Ints]:
    """Return (keys, indices in the part) of the rows that did not fail."""
    with _reading(part), _open(part) as file:
        _refuse_others(part, json.loads((file.schema_arrow.metadata or {})[b"batchinfer"]), fingerprints)
        found, wanted = file.schema_arrow, part_schema(results)
        if KEY.name not in found.names:
            raise Refused(
                f"--reuse: {part} has no answer keys, since an earlier version of batchinfer wrote it; leave its "
                "output out"
            )
        if not found.equals(wanted):
            raise Refused(
                f"--reuse: {part} has other result columns than this job: {sorted({*found.names} ^ {*wanted.names})}; "
                "leave its output out, or give the flags of that job, as --output-columns"
            )
        table = file.read([KEY.name, "finish_reason"], use_threads=False)
    good = pc.and_(table[KEY.name].is_valid(), pc.not_equal(table["finish_reason"], "error")).to_numpy()
    indices = np.flatnonzero(good)
    keys = table[KEY.name].take(pa.array(indices)).to_pylist()
    return np.array(keys, f"S{KEY.type.byte_width}"), indices


def _taken(part: Path, rows: Ints, indices: Ints) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part at these indices [n], ascending, as rows [n]. One row group is read at a time."""
    first = 0
    with _reading(part), _open(part) as file:
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            mine = slice(*np.searchsorted(indices, [first, end]))
            if mine.start < mine.stop:
                table = file.read_row_group(group, use_threads=False).replace_schema_metadata(None)
                table = table.combine_chunks()
                tokens = table["completion_tokens"].to_numpy()[indices[mine] - first].astype(np.int64)
                for some in cut(tokens, TAKEN_ROWS, TAKEN_TOKENS):
                    answers = table.take(pa.array(indices[mine][some] - first)).combine_chunks()
                    place = table.schema.get_field_index(ROW)
                    answers = answers.set_column(place, table.schema.field(place), pa.array(rows[mine][some]))
                    yield from answers.to_batches()
            first = end


def _open(part: Path) -> pq.ParquetFile:
    return pq.ParquetFile(part, page_checksum_verification=True, pre_buffer=False)


@contextmanager
def _reading(part: Path) -> Iterator[None]:
    """Name the part in errors of a damaged one."""
    try:
        yield
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said: Any = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"--reuse: part {part} is damaged: {said}; leave its output out") from error
