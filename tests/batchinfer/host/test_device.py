"""Choosing a job's device from the driver and the build of torch."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import UsageError
from batchinfer.host import device
from batchinfer.jobs.spec import JobSpec


class Driver:
    """Answers as the CUDA driver does."""

    def __init__(self, status: int, count: int, capability: tuple[int, int] = (9, 0)) -> None:
        self.status, self.count, self.capability = status, count, capability

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Tesla T4"
        return 0

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: Any) -> int:
        found._obj.value = {75: self.capability[0], 76: self.capability[1]}[attribute]
        return 0


@pytest.mark.parametrize(
    ("torch_version", "status", "count", "expected"),
    [
        ("2.11.0", 0, 1, True),
        ("2.11.0+cu128", 0, 8, True),
        ("2.11.0+cu128", 100, 8, False),  # CUDA_ERROR_NO_DEVICE: none is visible
        ("2.11.0+cu128", 0, 0, False),
        ("2.13.0+cpu", 0, 1, False),
    ],
)
def test_a_gpu_counts_if_torch_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, status: int, count: int, expected: bool
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status, count))
    assert device.has_gpu(torch_version) == expected


def test_without_a_driver_there_is_no_gpu() -> None:
    assert device.cuda_devices("libcuda-of-nobody.so.1") == 0


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
def test_a_gpu_that_is_too_old_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(0, 1, capability))
    if capability >= (8, 0):
        device.refuse_old_gpu()
    else:
        with pytest.raises(ValueError) as error:
            device.refuse_old_gpu()
        assert str(error.value) == (
            "the GPU Tesla T4 has compute capability 7.5, and the kernels need 8.0 or more; take --device cpu"
        )


def test_a_gpu_is_not_refused_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(100, 1, (7, 5)))
    device.refuse_old_gpu()


def test_auto_takes_the_gpu_and_a_named_device_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str) -> str:
        return device.device_of(name)

    for there in (True, False):
        monkeypatch.setattr(device, "has_gpu", lambda version, there=there: there)
        assert of("auto") == ("cuda" if there else "cpu")
        assert of("cpu") == "cpu" and of("cuda") == "cuda"


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_memory_is_a_share(share: float) -> None:
    with pytest.raises(UsageError, match="gpu-memory-utilization"):
        JobSpec((Path("a.parquet"),), Path("o.parquet"), "m", prompt_column="p", gpu_memory_utilization=share)
