"""`Findings`: what a part of a stage has measured, checked and missed; plain lists, which are JSON as they stand."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FAULTS_SHOWN = 4000
"""Characters of a traceback that are kept, the last ones."""

DEVICE_LOST = 3
"""The exit code of a process whose device is lost."""


class DeviceLost(Exception):
    """The device answers no more: a kernel has broken the process's context, and only another process can go on."""


@dataclass
class Findings:
    """Tables by title, aims with what was measured beside them, and faults, each with its traceback."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    aims: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: Callable[[], None] = field(default=lambda: None, repr=False)  # called whenever something was found

    def row(self, table: str, **columns: Any) -> None:
        """A row of a table, in the order of the columns of its first row."""
        self.tables.setdefault(table, []).append(columns)
        self.changed()

    def aim(self, aim: str, measured: str, met: bool) -> None:
        """What was wanted beside what came out. An aim that is missed is no fault."""
        self.aims.append({"aim": aim, "measured": measured, "met": bool(met)})
        self.changed()

    def note(self, text: str) -> None:
        """A remark: what was left out, and why."""
        self.notes.append(text)
        self.changed()

    def fault(self, case: str, error: BaseException) -> None:
        """An error, by the case in which it happened."""
        text = "".join(traceback.format_exception(error))[-FAULTS_SHOWN:]
        self.faults.append({"case": case, "error": f"{type(error).__name__}: {error}"[:500], "traceback": text})
        self.changed()

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What goes wrong within is a fault, and what follows goes on; unless the device is lost."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            self.fault(name, error)
            if not device_answers():
                raise DeviceLost(f"after {name}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tables": self.tables, "aims": self.aims, "faults": self.faults, "notes": self.notes}


def device_answers() -> bool:
    """False if work on the device cannot be waited for any more; True where there is none."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
