"""The commit protocol as a state machine: runs that begin, commit, die at any call, fail at any call, and go on.

What Hypothesis may do: begin, commit rows, end the job, come back to failed rows, try to run twice.
Each change of a file may be the last one of its process, or fail for want of space.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.results.done import Done
from batchinfer.jobs.results.durable import write_json
from batchinfer.jobs.results.output_writer import digest_of, is_there
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.results.schema import part_schema

ROWS = 12
INPUT = pa.schema([("id", pa.int64())])
CHANGES = ("link", "rename", "unlink", "mkdir", "fsync", "rmdir", "open")
FAULTS = st.tuples(st.sampled_from(["killed", "full"]), st.integers(1, 14))
SELDOM = st.one_of(*[st.none()] * 4, FAULTS)


class Killed(BaseException):
    """The process is gone: it changes nothing any more, not even to clean up."""


@contextmanager
def fault(what: tuple[str, int] | None) -> Iterator[None]:
    """At that call from now on which changes files, the process is killed, or the disk full."""
    if what is None:
        yield
        return
    kind, number = what
    calls = 0

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if kind == "killed" and calls >= number:
                raise Killed
            if kind == "full" and calls == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, faulty(getattr(os, name)))
        yield


def finished(rows: list[int], failed: list[int]) -> pa.RecordBatch:
    n = len(rows)
    columns = {
        "row": rows,
        "key": [None if row in failed else b"%016d" % row for row in rows],
        "generated_text": [None if row in failed else f"answer {row}" for row in rows],
        "finish_reason": ["error" if row in failed else "stop" for row in rows],
        "prompt_tokens": [row + 1 for row in rows],
        "completion_tokens": [2] * n,
        "error_code": ["not_finite" if row in failed else None for row in rows],
        "error_message": [None] * n,
    }
    return pa.RecordBatch.from_pydict(columns, schema=part_schema())


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.folder: RunFolder | None = None  # of the process at work
        self.parts: list[dict[int, str]] = []  # that must be there: how the rows in them ended
        self.in_flight: list[dict[int, str]] = []  # perhaps one more: the process ended while it was committed
        self.rest: list[int] = []  # to run

    @initialize(name=st.sampled_from(["out.parquet", "out"]), bad=st.sets(st.integers(0, ROWS - 1), max_size=4))
    def choose(self, name: str, bad: set[int]) -> None:
        self.output = self.place / name
        self.bad = bad  # fail at their first attempt

    def teardown(self) -> None:
        self.gone()
        shutil.rmtree(self.place)

    def gone(self) -> None:
        """The process ends, one way or the other: the system takes its lock."""
        if self.folder is not None:
            self.folder.close()
        self.folder, self.rest = None, []

    def attempt(self, what: tuple[str, int] | None, act: Callable[[], Any]) -> Any:
        """What `act` returns; None where the process ended in it."""
        try:
            with fault(what):
                return act() or True
        except (Killed, OSError) as error:
            assert what is not None and (isinstance(error, Killed) or error.errno == errno.ENOSPC), error
            self.gone()
            return None

    @precondition(lambda self: self.folder is None)
    @rule(what=SELDOM, retry=st.booleans())
    def begin(self, what: tuple[str, int] | None, retry: bool) -> None:
        self.folder = folder = RunFolder(self.output)
        folder.refuse_foreign()
        self.parts, self.in_flight = self.on_disk(), []
        done = self.attempt(what, lambda: folder.open({}, {"input": "x"}, ROWS, False, retry))
        if done is None:
            return
        assert isinstance(done, Done)
        wanted = {row for row, reason in self.ended.items() if reason == "stop" or not retry}
        assert set(np.flatnonzero(done.rows).tolist()) == wanted, "no row is lost, none appears"
        self.rest = [row for row in range(ROWS) if row not in wanted]

    @property
    def ended(self) -> dict[int, str]:
        return {row: reason for part in self.parts for row, reason in part.items()}

    def on_disk(self) -> list[dict[int, str]]:
        tables = [pq.read_table(path) for path in sorted((self.place / "out.run" / "parts").glob("part-*"))]
        return [dict(zip(t["row"].to_pylist(), t["finish_reason"].to_pylist(), strict=True)) for t in tables]

    @precondition(lambda self: self.rest)
    @rule(data=st.data(), what=st.one_of(st.none(), FAULTS))
    def commit(self, data: st.DataObject, what: tuple[str, int] | None) -> None:
        assert self.folder is not None
        folder, ended = self.folder, self.ended
        rows = data.draw(st.lists(st.sampled_from(self.rest), min_size=1, max_size=4, unique=True))
        fails = [row for row in rows if row in self.bad and row not in ended]
        self.in_flight = [{row: "error" if row in fails else "stop" for row in sorted(rows)}]
        if self.attempt(what, lambda: folder.commit([finished(rows, fails)])):
            self.parts, self.in_flight = [*self.parts, *self.in_flight], []
            self.rest = [row for row in self.rest if row not in rows]

    @precondition(lambda self: self.folder is not None and not self.rest)
    @rule(what=st.one_of(st.none(), FAULTS))
    def complete(self, what: tuple[str, int] | None) -> None:
        assert self.folder is not None
        folder = self.folder

        def finish() -> None:
            folder.write_manifest(ROWS)
            batch = pa.record_batch([pa.array(range(ROWS))], INPUT)
            aside = folder.merge(INPUT, [(0, batch)], ROWS)
            write_json(folder.report, {"output_sha256": digest_of(aside)})
            folder.publish(aside)

        if self.attempt(what, finish):
            assert folder.published
            self.gone()

    @precondition(lambda self: self.folder is not None)
    @rule()
    def another_begins(self) -> None:
        other = RunFolder(self.output)
        with pytest.raises(Interrupted):
            other.open({}, {"input": "x"}, ROWS, False, False)

    @precondition(lambda self: self.folder is None and self.parts)
    @rule()
    def another_job(self) -> None:
        other = RunFolder(self.output)
        with pytest.raises(Refused, match="another input"):
            other.open({}, {"input": "y"}, ROWS, False, False)
        other.close()

    @invariant()
    def an_output_is_whole(self) -> None:
        if not hasattr(self, "output") or not is_there(self.output):
            return
        table = pq.read_table(self.output)
        assert table["id"].to_pylist() == list(range(ROWS))
        for row, (text, reason) in enumerate(
            zip(table["generated_text"].to_pylist(), table["finish_reason"].to_pylist(), strict=True)
        ):
            assert (text, reason) == (f"answer {row}", "stop") or (
                row in self.bad and (text, reason) == (None, "error")
            )

    @invariant()
    def each_part_is_whole_or_absent_and_rows_come_again_only_after_an_error(self) -> None:
        found = self.on_disk()
        assert found in (self.parts, self.parts + self.in_flight)
        ended: dict[int, str] = {}
        for part in found:
            assert all(ended.get(row, "error") == "error" for row in part)
            ended |= part


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


class LongProtocol(Protocol):
    """The same for many more runs."""


TestLongProtocol = pytest.mark.long(minutes=2)(LongProtocol.TestCase)
TestLongProtocol.settings = settings(max_examples=500, stateful_step_count=50, deadline=None, derandomize=True)
