"""Naming a process so that another process can tell whether it still runs, from Linux's /proc."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class ProcessName:
    """A process on a machine. Process ids are used again, so its start is a part of the name."""

    host: str
    boot: str  # id of the machine's boot; empty if the system does not say
    namespace: str  # of its process ids: containers have their own; empty if the system does not say
    pid: int
    started: int  # in ticks since boot; 0 if the system does not say

    @classmethod
    def own(cls) -> "ProcessName":
        """Return the name of this process."""
        boot, namespace = "", ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        pid = os.getpid()
        _, started = _state_and_start(pid) or ("", 0)
        return cls(platform.node(), boot, namespace, pid, started)

    def runs(self) -> bool | None:
        """Return whether the process runs; None if that cannot be told from here, as on another machine."""
        here = replace(ProcessName.own(), pid=self.pid, started=self.started)
        if here != self:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it is another user's
        found = _state_and_start(self.pid)
        if found is None or not self.started:
            return None
        state, started = found
        return started == self.started and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """Return a process's state, a letter (Z for one that ended), and its start; None if the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])  # fields 3 and 22 of proc(5); the second is a name, which may hold spaces
