"""Every exit code, by the command line itself; none of them comes with a traceback."""

import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stub_jobs import ENGINES, SCRIPT, STUB, expected, make_model, prompts, write

STANDS_STILL = """
class StandsStill(Slow):
    SECONDS = 100

    def step(self):
        open("in_its_step", "w").close()
        return super().step()
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Begins `batchinfer run` over 400 rows, with an engine and flags."""
    make_model(tmp_path)
    write(tmp_path / "in.parquet", prompt=prompts(400))
    write(tmp_path / "nulls.parquet", prompt=[None, None, "x" * 999])
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + STANDS_STILL)

    def begin(
        engine: str, *flags: str, rows: str = "in.parquet", file_bytes: int | None = None
    ) -> subprocess.Popen[str]:
        engine = STUB if engine == "stub" else f"engines_of_the_test:{engine}"
        script = textwrap.dedent(SCRIPT).replace("engines_of_the_test:Slow", engine)
        (tmp_path / "main.py").write_text(script)
        command = [
            sys.executable,
            "main.py",
            ".",
            "run",
            rows,
            "-o",
            "out.parquet",
            "--model",
            ".",
            "--max-tokens",
            "8",
        ]

        def limit() -> None:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        return subprocess.Popen(
            [*command, *flags],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    return begin


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, the last line of stderr)."""
    errors = process.communicate(timeout=120)[1]
    assert "Traceback" not in errors, errors
    return process.returncode, (errors.splitlines() or [""])[-1]


def test_done(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    assert ended(start("stub"))[0] == 0
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(tmp_path, prompts(400))
    code, said = ended(start("stub"))
    assert code == 0 and said.endswith("batchinfer: out.parquet is complete already; nothing is run")


def test_a_wrong_flag(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, said = ended(start("stub", "--max-tokens", "0"))
    assert code == 2 and "--max-tokens" in said


def test_refused(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, said = ended(start("stub", "--prompt-column", "text"))
    assert code == 65 and "has no column 'text'" in said


def test_every_row_failed(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, said = ended(start("stub", rows="nulls.parquet"))
    assert code == 65 and "every row failed" in said and (tmp_path / "out.parquet").exists()


def test_another_job_in_the_same_place(start: Callable[..., subprocess.Popen[str]]) -> None:
    assert ended(start("stub"))[0] == 0
    code, said = ended(start("stub", "--seed", "1"))
    assert code == 65 and "was begun with another sampling" in said


def test_an_engine_that_cannot(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, said = ended(start("break_down"))
    assert code == 70 and "the engine failed: KeyError" in said and not (tmp_path / "out.parquet").exists()


def test_a_file_that_cannot_be_written(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, said = ended(start("stub", file_bytes=4000))
    assert code == 74 and "File too large: " in said and not (tmp_path / "out.parquet").exists()
    assert ended(start("stub"))[0] == 0
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 400


def test_the_time_is_up(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, said = ended(start("Slow", "--time-limit", "0:02"))
    assert code == 75 and "stopped after" in said
    assert ended(start("stub"))[0] == 0
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 400


def test_another_run_is_at_work(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    first = start("StandsStill")
    wait_for(first, tmp_path / "in_its_step")
    code, said = ended(start("StandsStill"))
    first.kill()
    first.communicate()
    assert code == 75 and "another run is at work in out.run" in said


def test_grace_is_kept_and_a_second_signal_ends_at_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A step of the engine that takes 100 seconds is not waited for."""
    process = start("StandsStill", "--grace", "3")
    wait_for(process, tmp_path / "in_its_step")
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 75 and "stopped after 0 of 400 rows" in said
    (tmp_path / "in_its_step").unlink()
    process = start("StandsStill", "--grace", "60")
    wait_for(process, tmp_path / "in_its_step")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
    assert ended(process)[0] == -signal.SIGTERM


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
