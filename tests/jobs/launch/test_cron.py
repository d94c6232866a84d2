"""Jobs that cron or systemd start: lines and units that mean what they say, and two starts of one job."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stub_jobs import ENGINES, SCRIPT, expected, prompts, write

from batchinfer.errors import UsageError
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.launch import systemd
from batchinfer.jobs.launch.cron import crontab_line
from batchinfer.jobs.launch.recurring import RecurringJob
from batchinfer.jobs.launch.schedule import Schedule

ODD = [
    "plain",
    "",
    "two words",
    'it\'s "quoted" $HOME `date` ${X} !! #no ;',
    "100%",
    "%n %h %% %",
    "%",
    r"\%",
    r"\\%",
    r"a\b\\c\\\d\\",
    r"\'%'\%\\'",
    "größe 東京 \u202f",
    "~ * ? [a] {x} | & < > ( )",
    ";",
    "-",
]


def recurring(folder: Path, *command: str, schedule: str = "0 2 * * *") -> RecurringJob:
    output = folder / "out.parquet"
    return RecurringJob(
        "batchinfer-out-1", output, Schedule.parse(schedule), folder, command, output.with_suffix(".log"), 30.0
    )


def handed_over(command: str, halves_backslashes: bool) -> str:
    """What cron gives to the shell of a line behind its schedule; some crons make one backslash of two."""
    taken, escaped = "", False
    for letter in command:
        if escaped and letter in ("%\\" if halves_backslashes else "%"):
            taken = taken[:-1]
        assert escaped or letter != "%", "from here on it is what the command reads"
        taken += letter
        escaped = letter == "\\" and not escaped
    return taken


@pytest.mark.parametrize("halves_backslashes", [False, True])
@pytest.mark.parametrize("name", ["folder", "a b'c\"d%e\\%f\\\\g$h;é"])
def test_the_shell_gets_every_word_as_it_was(tmp_path: Path, name: str, halves_backslashes: bool) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "tell.py").write_text("import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))")
    line = crontab_line(recurring(folder, sys.executable, str(tmp_path / "tell.py"), *ODD))
    assert "\n" not in line and line.startswith("0 2 * * * cd ")
    command = handed_over(line.removeprefix("0 2 * * * "), halves_backslashes)
    for _ in range(2):
        assert subprocess.run(["/bin/sh", "-c", command], capture_output=True, env={}).stdout == b""
    said = (folder / "out.log").read_text().splitlines()
    assert list(map(json.loads, said)) == [[str(folder), ODD]] * 2


# Instants of 2026 and 2027 that each schedule names from Monday, the 2nd of November 2026, on.
SCHEDULES = {
    "0 2 * * *": ["11-02 02:00", "11-03 02:00", "11-04 02:00"],
    "*/20 23 * * *": ["11-02 23:00", "11-02 23:20", "11-02 23:40", "11-03 23:00"],
    "7-59/25 3,1 * * *": ["11-02 01:07", "11-02 01:32", "11-02 01:57", "11-02 03:07"],
    "0 0 1 * *": ["12-01 00:00", "01-01 00:00"],
    "30 4 * * 7": ["11-08 04:30", "11-15 04:30"],
    "30 4 * * 0": ["11-08 04:30", "11-15 04:30"],
    "0 0 * * sat-7": None,
    "0 0 * * 5-7": ["11-06 00:00", "11-07 00:00", "11-08 00:00", "11-13 00:00"],
    "0 0 * * Mon-Fri": ["11-02 00:00", "11-03 00:00", "11-04 00:00", "11-05 00:00", "11-06 00:00", "11-09 00:00"],
    "0 12 * dec-DEC Sun,wed": ["12-02 12:00", "12-06 12:00", "12-09 12:00"],
    "0 0 13 * 5": ["11-06 00:00", "11-13 00:00", "11-20 00:00", "11-27 00:00", "12-04 00:00", "12-11 00:00"],
    "0 0 10,13 11 5": ["11-06 00:00", "11-10 00:00", "11-13 00:00", "11-20 00:00", "11-27 00:00"],
    "0 0 */2 * 1": ["11-09 00:00", "11-23 00:00", "12-07 00:00"],
    "0 0 31 1-12/1 *": ["12-31 00:00", "01-31 00:00", "03-31 00:00"],
    "59 23 29 2 *": ["02-29 23:59"],
    "* * * * *": ["11-02 00:00", "11-02 00:01"],
    "5 * * * *": ["11-02 00:05", "11-02 01:05"],
}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_systemd_reads_the_same_times(schedule: str) -> None:
    instants = SCHEDULES[schedule] or ["11-07 00:00", "11-08 00:00", "11-14 00:00"]
    found: set[str] = set()
    for calendar in Schedule.parse(schedule).calendars():
        command = ["systemd-analyze", "calendar", f"--iterations={len(instants)}", "--base-time=2026-11-01 23:59:59"]
        done = subprocess.run(
            [*command, calendar], capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"}
        )
        found |= set(re.findall(r"(?:elapse|Iter\. #\d+): \w+ (\S+ \d\d:\d\d):00 UTC", done.stdout))
    assert [instant[5:] for instant in sorted(found)][: len(instants)] == instants


@pytest.mark.parametrize(
    "schedule",
    [
        *("", "0 2 * *", "0 2 * * * *", "@daily", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *"),
        *("* * * * 8", "* * * january *", "5/15 * * * *", "*/0 * * * *", "10-5 * * * *", "0,,5 * * * *", "1, * * * *"),
        *("-5 * * * *", "1_0 * * * *", "٣ * * * *", "0 0 * * fri-mon", "0 0 L * *", "0 0 ? * *", "H 2 * * *"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: str) -> None:
    with pytest.raises(UsageError, match="--schedule"):
        Schedule.parse(schedule)


def dry_run(table: Path) -> subprocess.CompletedProcess[bytes]:
    """The real `crontab` reads a table, and changes nothing."""
    return subprocess.run(["crontab", "-n", str(table)], capture_output=True)


@pytest.mark.skipif(shutil.which("crontab") is None, reason="cron is not installed")
def test_cron_takes_the_same_lines(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text("0 2 * * * true\n")
    if dry_run(table).returncode:
        pytest.skip("this crontab cannot only look")
    lines = [crontab_line(recurring(tmp_path, "run", *ODD, schedule=schedule)) for schedule in SCHEDULES]
    table.write_text("\n".join(lines) + "\n")
    assert dry_run(table).returncode == 0, dry_run(table).stderr
    table.write_text(lines[0] + " " + "x" * 998 + "\n")
    assert b"too long" in dry_run(table).stderr


def test_a_line_that_is_too_long_for_cron_names_the_remedy(tmp_path: Path) -> None:
    rest = 998 - len(crontab_line(recurring(tmp_path, "é")).removeprefix("0 2 * * * ").encode())
    crontab_line(recurring(tmp_path, "é" + "x" * rest))
    with pytest.raises(UsageError, match=r"999 bytes .* takes at most 998: .*--config"):
        crontab_line(recurring(tmp_path, "é" + "x" * (rest + 1)))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    folder = tmp_path / "a b'c\"d%e\\f$g"
    folder.mkdir()
    job = recurring(folder, sys.executable, *ODD, schedule="0 0 13 * 5")
    for name, text in systemd.units(job).items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", *tmp_path.glob("*.*")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\nWorkingDirectory={tmp_path}/a b'c\"d%%e\\f$g\n" in (tmp_path / f"{job.name}.service").read_text()
    # Words of Environment= are read as those of ExecStart= are, and said again where they assign nothing.
    unit = tmp_path / "words.service"
    words = "".join(f"Environment={systemd.quoted(f'={word}')}\n" for word in ODD)
    unit.write_text(f"[Service]\nType=oneshot\nExecStart=/bin/true\n{words}")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    read = [line.partition("ignoring: =")[2] for line in done.stderr.splitlines()]
    assert read == ODD


def test_paths_that_a_unit_cannot_hold_are_refused(tmp_path: Path) -> None:
    for name in ("ends in \\", "ends in "):
        with pytest.raises(UsageError, match="ends in a space or a backslash"):
            systemd.units(replace(recurring(tmp_path, "run"), log=tmp_path / name))


FAKE_CRONTAB = """#!/bin/sh
case "$1" in
-l) if [ -e "$TABLE.broken" ]; then echo "You are not allowed to use this program" >&2; exit 1; fi
    if [ ! -e "$TABLE" ]; then echo "no crontab for somebody" >&2; exit 1; fi
    exec cat "$TABLE";;
-)  exec cat > "$TABLE";;
*)  exit 2;;
esac
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file behind a `crontab` program that is not the real one."""
    program = tmp_path / "bin" / "crontab"
    program.parent.mkdir()
    program.write_text(FAKE_CRONTAB)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("TABLE", str(tmp_path / "table"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "table"


@pytest.fixture
def cron(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cron(*flags, output="out.parquet", run=[]) -> (exit code, stdout, stderr)` of the command."""

    def call(
        *flags: str, output: str = "out.parquet", run: tuple[str, ...] = (), program: str = "/opt/batchinfer"
    ) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            arguments = ["in.parquet", "-o", output, "--model", "m", *run]
            patch.setattr(sys, "argv", [program, "cron", *flags, "--", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


Cron = Callable[..., tuple[int, str, str]]


def test_the_line_is_printed_with_absolute_paths(table: Path, cron: Cron) -> None:
    code, out, err = cron("--schedule", " 0  2 * * * ", run=("--max-tokens", "3"))
    folder = table.parent
    line = (
        f"0 2 * * * cd {folder} && {sys.executable} /opt/batchinfer run in.parquet -o out.parquet --model m "
        f"--max-tokens 3 >> {folder}/out.log 2>&1 # batchinfer-out-"
    )
    assert (code, err) == (0, "") and out.startswith(line)
    assert not table.exists()
    assert f">> {folder}/nightly.log 2>&1" in cron("--schedule", "0 2 * * *", "--log", "nightly.log")[1]


def test_the_package_is_started_by_its_name(table: Path, cron: Cron) -> None:
    out = cron("--schedule", "0 2 * * *", program="/opt/batchinfer/__main__.py")[1]
    assert f"&& {sys.executable} -P -m batchinfer run in.parquet " in out


def test_install_puts_one_line_a_job_and_leaves_the_others(table: Path, cron: Cron) -> None:
    assert cron("--schedule", "0 2 * * *", "--install")[0] == 0
    assert table.read_bytes().count(b"\n") == 1
    others = b'MAILTO=""\n\n# out.parquet \xff\n5 5 * * * batchinfer run in.parquet -o out.parquet # mine\n'
    table.write_bytes(others + table.read_bytes() + b"6 6 * * * last")
    assert cron("--schedule", "0 2 * * *", "--install", output="deep/out.parquet")[0] == 65
    (table.parent / "deep").mkdir()
    assert cron("--schedule", "0 2 * * *", "--install", output="deep/out.parquet")[0] == 0
    for same in ("out.parquet", "deep/../out.parquet"):
        code, out, _ = cron("--schedule", "0 3 * * *", "--install", output=same, run=("--seed", "1"))
        assert code == 0 and out.startswith("installed: 0 3 * * * ")
    kept, of_deep, of_out = table.read_bytes().rsplit(b"\n", 3)[:3]
    assert kept + b"\n" == others + b"6 6 * * * last\n"
    assert b"0 2 * * * " in of_deep and b"-o deep/out.parquet" in of_deep
    assert of_out.startswith(b"0 3 * * * ") and b"--seed 1" in of_out


def test_a_crontab_that_cannot_be_read_is_not_replaced(table: Path, cron: Cron) -> None:
    table.write_text("5 5 * * * precious\n")
    Path(f"{table}.broken").touch()
    code, _, err = cron("--schedule", "0 2 * * *", "--install")
    assert code == 65 and "nothing was changed: You are not allowed to use this program" in err
    assert table.read_text() == "5 5 * * * precious\n"


def test_without_cron_the_error_names_the_remedy(table: Path, cron: Cron, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = cron("--schedule", "0 2 * * *", "--install")
    assert code == 65 and "the program crontab is not installed: install cron, give --systemd" in err


def test_units_are_printed_or_put_where_the_user_s_lie(
    table: Path, cron: Cron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(table.parent))
    code, printed, _ = cron("--schedule", "0 2 * * *", "--systemd", run=("--grace", "100"))
    assert code == 0 and not (table.parent / ".config").exists()
    for hour in (1, 2):
        code, out, err = cron("--schedule", f"0 {hour} * * *", "--systemd", "--install", run=("--grace", "100"))
        assert (code, err) == (0, "")
    units = sorted((table.parent / ".config" / "systemd" / "user").iterdir())
    assert [unit.suffix for unit in units] == [".service", ".timer"]
    assert f"systemctl --user enable --now {units[1].name}" in out
    service, timer = (unit.read_text() for unit in units)
    assert "OnCalendar=*-*-* 02:00:00\n" in timer and "TimeoutStopSec=110\n" in service
    assert printed == f"# {units[0]}\n{service}\n# {units[1]}\n{timer}\n"
    assert not table.exists()


@pytest.mark.parametrize(
    ("flags", "run", "code", "message"),
    [
        (["--schedule", "0 25 * * *"], [], 2, "'25' as its hour; give numbers from 0 to 23"),
        (["--schedule", "@daily"], [], 2, "--schedule is '@daily'; give five fields: minute, hour"),
        ([], [], 2, "--schedule"),
        (["--schedule", "0 2 * * *"], ["--max-tokens", "0"], 2, "--max-tokens is 0"),
        (["--schedule", "0 2 * * *"], ["--no-such-flag"], 2, "--no-such-flag"),
        (["--schedule", "0 2 * * *"], ["--config", "none.toml"], 2, "none.toml: No such file"),
        (["--schedule", "0 2 * * *"], ["--help"], 2, "ask for help and do not describe a job"),
        (["--schedule", "0 2 * * *"], ["--stop", "\n"], 2, r"'\n' has a control character"),
        (["--schedule", "0 2 * * *", "--log", "x/y.log"], [], 65, "there is no folder"),
        (["--schedule", "0 2 * * *"], ["--stop", "x" * 1000], 2, "put the flags into a job file (--config)"),
    ],
)
@pytest.mark.parametrize("install", [[], ["--install"]])
def test_what_cannot_run_is_refused_up_front(
    table: Path, cron: Cron, install: list[str], flags: list[str], run: list[str], code: int, message: str
) -> None:
    ended, _, err = cron(*flags, *install, run=tuple(run))
    assert (ended, err.count("\n")) == (code, 1) and message in err
    assert not table.exists()


WAITS = """
class Waits(Slow):
    # At its first step, until it may go on.
    def step(self):
        folder = os.environ["FOLDER"]
        open(os.path.join(folder, "at-work"), "w").close()
        while not os.path.exists(os.path.join(folder, "go")):
            time.sleep(0.01)
        return super().step()
"""


@pytest.fixture
def command(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What cron starts: the line of a job whose engine waits until there is a file `go`."""
    write(tmp_path / "in.parquet", prompt=prompts(30))
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + WAITS)
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT).replace(":Slow", ":Waits"))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    run = f"run in.parquet -o out.parquet --model {model} --max-tokens 8 --metrics-textfile job.prom".split()
    line = crontab_line(recurring(tmp_path, sys.executable, str(tmp_path / "main.py"), str(tmp_path), *run))
    yield ["/bin/sh", "-c", handed_over(line.removeprefix("0 2 * * * "), True)]
    (tmp_path / "go").touch()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """All in it, but the log that both write, and the heartbeat of the job at work, which its folder's time shows."""
    return {
        path: (
            path.stat().st_ino,
            0 if path.is_dir() else path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
        if path.name not in ("out.log", "heartbeat.json", "heartbeat.json.tmp")
    }


def test_a_start_while_the_job_is_at_work_ends_with_75_and_changes_no_file(tmp_path: Path, command: list[str]) -> None:
    first = subprocess.Popen(command)
    until(lambda: (tmp_path / "at-work").exists() or first.poll() is not None)
    before = files(tmp_path)
    assert subprocess.run(command, timeout=60).returncode == 75
    assert files(tmp_path) == before
    log = (tmp_path / "out.log").read_text()
    assert "another run is at work in out.run; nothing was done" in log.splitlines()[-1]
    (tmp_path / "go").touch()
    assert first.wait(timeout=60) == 0
    assert "batchinfer_job_exit_code" in (tmp_path / "job.prom").read_text()


def test_of_two_starts_at_once_one_does_the_job(tmp_path: Path, model: Path, command: list[str]) -> None:
    both = [subprocess.Popen(command) for _ in range(2)]
    until(lambda: any(process.poll() is not None for process in both))
    (tmp_path / "go").touch()
    assert sorted(process.wait(timeout=60) for process in both) == [0, 75]
    texts = pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist()
    assert texts == expected(model, prompts(30))
