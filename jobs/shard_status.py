"""`batchinfer status` of a job of shards: how all go together, and each of them in a line of a table."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.log import printable
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.pulse import Pulse
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.status import Status, in_range, print_each, read_status, watched

STATES = ("running", "dead", "stopped", "unknown", "not begun", "complete")  # the first that a shard has is the job's
READ_AT_ONCE = 32  # shards: one that is silent on another machine is watched for some seconds


@dataclass(frozen=True)
class Total:
    """How the shards go together. Rates are those of shards that run now; what is not known is None."""

    state: str  # one of `STATES`
    shards: dict[str, int]  # state -> number of shards
    rows: int | None  # of the shards that have read their input
    rows_done: int
    rows_failed: int
    rows_by_error: dict[str, int] = field(default_factory=dict)
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    time_left: TimeLeft | None = None  # until the slowest of those that run has ended

    @classmethod
    def of(cls, shards: Sequence[Status]) -> "Total":
        """Add up."""
        states = Counter(shard.state for shard in shards)
        running = [shard for shard in shards if shard.state == "running"]
        errors = Counter[str]()
        for shard in shards:
            errors.update(shard.rows_by_error)
        return cls(
            state=next(state for state in STATES if states[state]),
            shards={state: states[state] for state in STATES if states[state]},
            rows=_sum([shard.rows for shard in shards]),
            rows_done=sum(shard.rows_done or 0 for shard in shards),
            rows_failed=sum(shard.rows_failed or 0 for shard in shards),
            rows_by_error=dict(errors.most_common()),
            rows_per_second=_sum([shard.rows_per_second for shard in running]),
            tokens_per_second=_sum([shard.tokens_per_second for shard in running]),
            time_left=_slowest([shard.time_left for shard in running if shard.phase != "merging"]),
        )


@dataclass(frozen=True)
class ShardsStatus:
    """How all shards go, and each of them: what `--json` prints."""

    total: Total
    shards: list[Status]

    @property
    def over(self) -> bool:
        """True if no shard runs, or has still to begin."""
        return not self.total.shards.keys() & {"running", "not begun"}

    def text(self) -> str:
        """Return the total as aligned lines, and a table of the shards."""
        total, unread = self.total, sum(shard.rows is None for shard in self.shards)
        counted = ", ".join(f"{count:,} {state}" for state, count in total.shards.items())
        lines = [("shards", f"{len(self.shards):,}: {counted}")]
        if total.rows is not None:
            share = f" ({100 * total.rows_done / total.rows:.1f} %)" if total.rows and not unread else ""
            failed = f", {total.rows_failed:,} failed" if total.rows_failed else ""
            more = f", and those of shards whose input is not read yet ({unread:,})" if unread else ""
            lines.append(("rows", f"{total.rows_done:,} of {total.rows:,}{share}{more}{failed}"))
        lines += [(f"  {code}", count_of(rows, "row")) for code, rows in total.rows_by_error.items()]
        if total.rows_per_second is not None and total.tokens_per_second is not None:
            lines += [("rows/s", f"{total.rows_per_second:,.2f}"), ("tokens/s", f"{total.tokens_per_second:,.1f}")]
        if total.rows_per_second is not None:
            lines.append(("time left", in_range(total.time_left)))
        width = max(len(name) for name, _ in lines)
        return "\n".join([*(printable(f"{name:<{width}}  {value}") for name, value in lines), "", *self._table()])

    def json(self) -> str:
        """Return total and shards as a JSON object on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def _table(self) -> list[str]:
        rows = [("output", "state", "rows", "failed", "rows/s", "time left", ""), *map(_row, self.shards)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        aligned = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust]
        return [
            "  ".join(to(cell, n) for to, cell, n in zip(aligned, row, widths, strict=True)).rstrip() for row in rows
        ]


def print_shards(outputs: Sequence[Path], watch: bool, as_json: bool) -> None:
    """Print how the shards with these outputs go; with `watch`, again and again until all are over."""
    pulses = {output: Pulse() for output in outputs}

    def read() -> ShardsStatus:
        return read_shards(pulses)

    print_each(watched(read) if watch else [read()], watch, as_json)


def read_shards(pulses: dict[Path, Pulse]) -> ShardsStatus:
    """Return how the shards go; `pulses` has the outputs of all, with what was seen of each before."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        shards = list(pool.map(_read, pulses.keys(), pulses.values()))
    return ShardsStatus(Total.of(shards), shards)


def _read(output: Path, pulse: Pulse) -> Status:
    folder = RunFolder(output)
    try:
        return read_status(output, pulse)
    except Refused as error:
        begun = folder.begun and folder.path.exists()
        return Status(str(output), "unknown" if begun else "not begun", str(error))


def _row(shard: Status) -> tuple[str, ...]:
    known = shard.rows is not None and shard.rows_done is not None
    running = shard.state == "running"
    state = f"{shard.state}, {shard.phase}" if running and shard.phase != "generating" else shard.state
    return (
        printable(Path(shard.output).name),
        state,
        f"{shard.rows_done:,} of {shard.rows:,}" if known else "",
        f"{shard.rows_failed:,}" if shard.rows_failed else "",
        f"{shard.rows_per_second:,.2f}" if shard.rows_per_second is not None else "",
        in_range(shard.time_left) if running and shard.time_left is not None else "",
        printable(shard.reason) if shard.state in ("dead", "stopped", "unknown") else "",
    )


def _sum(figures: Sequence[Any]) -> Any:
    """Return the sum of the known figures; None if none is known."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None


def _slowest(left: Sequence[TimeLeft | None]) -> TimeLeft | None:
    """Return the time until all have ended; None if that of one is not known."""
    known = [each for each in left if each is not None]
    if not known or len(known) < len(left):
        return None
    highs = [each.high for each in known if each.high is not None]
    return TimeLeft(
        max(each.estimate for each in known),
        max(each.low for each in known),
        max(highs) if len(highs) == len(known) else None,
    )
