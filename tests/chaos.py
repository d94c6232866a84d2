"""Jobs killed at random moments, again and again, until each is complete: is any row lost or there twice?

python tests/chaos.py [--kills 500] [--seed 0]
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import TimeoutExpired

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

from killed_jobs import PART_ROWS, ROWS, STEPS_AHEAD, Job, make_job
from stub_jobs import expected, prompts

from batchinfer.jobs.verify import verify


def undisturbed_seconds(job: Job) -> float:
    """What a run takes."""
    job.clear()
    started = time.monotonic()
    assert job.run() == 0, (job.folder / "errors").read_text()
    return time.monotonic() - started


def one_job(job: Job, longest: float, chance: random.Random) -> tuple[int, int, int]:
    """(kills, rows lost, rows doubled) until it is complete; every other attempt it is left alone for longer."""
    job.clear()
    kills, patience = 0, longest
    while True:
        process = job.start()
        try:
            code = process.wait(timeout=chance.uniform(0, patience))
        except TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            patience *= 1.1
            continue
        assert code == 0, (job.folder / "errors").read_text()
        verify(job.output)
        answers = Counter(pq.read_table(job.output)["generated_text"].to_pylist())
        wanted = Counter(expected(job.folder, prompts(ROWS)))
        twice = sum(job.computed().values()) - ROWS
        assert twice <= kills * (PART_ROWS + 4 * STEPS_AHEAD), f"{twice} rows were computed again in {kills} kills"
        return kills, (wanted - answers).total(), (answers - wanted).total()


def main() -> None:
    """Kill, count, and fail if a row was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder))
        longest = undisturbed_seconds(job)
        kills = jobs = lost = doubled = 0
        while kills < args.kills:
            found = one_job(job, longest, chance)
            jobs, kills, lost, doubled = jobs + 1, kills + found[0], lost + found[1], doubled + found[2]
            print(f"{kills} kills, {jobs} jobs, {lost} rows lost, {doubled} doubled", flush=True)
    sys.exit(1 if lost or doubled else 0)


if __name__ == "__main__":
    main()
