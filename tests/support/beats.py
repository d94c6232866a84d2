"""The last beat of a job that generates, for tests of how a job goes."""

from dataclasses import replace

from batchinfer.host.process_name import ProcessName
from batchinfer.jobs.heartbeat import Beat
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.run_state import RunState

BEAT = replace(
    Beat.of(RunState(), ProcessName.own(), 7),
    phase="generating",
    rows=1000,
    rows_done=250,
    rows_failed=3,
    rows_by_error={"too_long": 2, "null_prompt": 1},
    rows_per_second=2.5,
    tokens_per_second=1234.5,
    time_left=TimeLeft(300.0, 250.0, 4000.0),
    peak_memory_bytes={"parent": 300_000_000, "engine": 1_500_000_000},
)
