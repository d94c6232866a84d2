"""Storing what `batchinfer doctor --calibrate` measured: a file in the user's cache for each device and set of
versions."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.cost.step_cost import DeviceCost, StepCost
from batchinfer.host.device import device_name
from batchinfer.host.user_cache import user_cache
from batchinfer.jobs.results.durable import write_json
from batchinfer.kernels.cpu_library import cpu_path

SCHEMA_VERSION = 2  # version 1 had a cost for each token, and the size of the last cache as the system reports it
REMEDY = "measure this device with 'batchinfer doctor --calibrate'"


@dataclass(frozen=True)
class DeviceKey:
    """The device and versions on which measured figures depend."""

    device: str
    cores: int
    torch: str
    cpu_path: str  # the path of a CPU's kernels; empty for other devices
    batchinfer: str  # the release only, so that a device need not be measured again after every commit

    @classmethod
    def of(cls, device: str, path: str = "auto") -> "DeviceKey":
        """Return the key of this machine's device "cpu" or "cuda", with the kernels of this path on a CPU.

        Raises `ValueError` for a path that does not run here.
        """
        kernels = cpu_path(path) if device == "cpu" else ""
        return cls(device_name(device), len(os.sched_getaffinity(0)), version("torch"), kernels, release(__version__))

    @property
    def path(self) -> Path:
        """Path of the file with the device's figures, if it was measured. Raises `RuntimeError` without a home
        folder."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return user_cache() / "devices" / f"{digest}.json"


def release(version: str) -> str:
    """Return the release that a development version leads to: "0.1.1" for "0.1.1.dev3+g1a2b3c4"."""
    return version.partition("+")[0].partition(".dev")[0]


def write_device_cost(key: DeviceKey, cost: DeviceCost) -> Path:
    """Write the figures to their file. Returns its path. Raises `OSError`."""
    key.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(key.path, {"schema_version": SCHEMA_VERSION, "measured_on": asdict(key), **asdict(cost)})
    return key.path


def read_device_cost(key: DeviceKey) -> tuple[DeviceCost | None, str | None]:
    """Return (the device's figures or None, the reason if they are None).

    A file that is damaged, or belongs to another device, gives None with that reason.
    """
    try:
        path = key.path
    except RuntimeError as error:  # there is no home folder
        return None, f"there is no folder for the figures of devices ({error}); set XDG_CACHE_HOME, then {REMEDY}"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, f"no times can be predicted yet; {REMEDY}"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path} cannot be read ({error}); {REMEDY}"
    try:
        return _parsed(values, key), None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        return None, f"{path} is damaged ({error!r}); {REMEDY} again"


def _parsed(values: Any, key: DeviceKey) -> DeviceCost:
    if values.pop("schema_version") != SCHEMA_VERSION:
        raise ValueError("another schema_version")
    if values.pop("measured_on") != asdict(key):
        raise ValueError("measured on another device")
    steps = {
        name: StepCost(_numbers(step["seconds"]), _numbers({"error": step["error"]})["error"])
        for name, step in values.pop("steps").items()
    }
    tables = {name: _numbers(values.pop(name)) for name in ("load_seconds", "operations_per_second")}
    numbers = _numbers(values)
    if not numbers["cache_bytes"]:
        raise ValueError("cache_bytes is 0")
    if tables["load_seconds"].keys() != steps.keys() or tables["operations_per_second"].keys() != steps.keys():
        raise ValueError("figures of different kinds of products")
    return DeviceCost(steps=steps, **tables, **numbers)  # type: ignore[arg-type]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}")
    return {name: float(value) for name, value in values.items()}
