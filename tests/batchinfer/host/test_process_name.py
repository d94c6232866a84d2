"""Whether a process still runs, told by its name."""

import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from batchinfer.host import process_name
from batchinfer.host.process_name import ProcessName


def test_this_process_runs_and_started_when_psutil_says() -> None:
    own = ProcessName.own()
    assert own.pid == os.getpid() and own.host == os.uname().nodename
    assert own.runs() is True
    ticks = os.sysconf("SC_CLK_TCK")
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    assert own.started / ticks == pytest.approx(since_boot, abs=1.5)


def test_a_process_that_ended_is_gone_before_anybody_waited_for_it_and_after() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = process_name._state_and_start(child.pid)
    assert found is not None
    name = replace(ProcessName.own(), pid=child.pid, started=found[1])
    assert name.runs() is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    assert name.runs() is False
    child.communicate()
    assert name.runs() is False


def test_another_process_that_got_the_same_id_is_not_taken_for_it() -> None:
    own = ProcessName.own()
    assert replace(own, started=own.started - 1).runs() is False


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_of_other_machines_and_containers_nothing_is_known(field: str) -> None:
    assert replace(ProcessName.own(), **{field: "another"}).runs() is None  # type: ignore[arg-type]


def test_where_proc_shows_no_other_users_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    name = replace(ProcessName.own(), pid=1)
    monkeypatch.setattr(process_name, "_state_and_start", lambda pid: None)
    monkeypatch.setattr(ProcessName, "own", lambda: name)
    assert name.runs() is None
