"""`batchinfer doctor`, and the file of what it measured."""

import json
import platform
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import call

from batchinfer.cost import calibrate, memory_speed
from batchinfer.cost.step_cost import PRODUCTS, DeviceCost, StepCost
from batchinfer.host import device
from batchinfer.jobs import doctor
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.plan import device_file
from batchinfer.jobs.plan.device_file import DeviceKey, read_device_cost, write_device_cost
from batchinfer.kernels import cpu_library, linear_w8a8
from batchinfer.kernels.cpu_library import cpu_path, why_reference

COST = DeviceCost(
    steps={name: StepCost({"step": 1e-3, "number": 2e-6}, 0.05) for name in PRODUCTS},
    load_seconds=dict.fromkeys(PRODUCTS, 1e-8),
    start_seconds=1.5,
    operations_per_second={"float32": 1e11, "bfloat16": 2e11, "w8a8-int8": 8e11, "w4a8": 8e11},
    bytes_per_second=2.5e10,
    cache_bytes=float(32 << 20),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batchinfer", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    out = capsys.readouterr()
    assert not ended.value.code, out.err
    return out.out


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines above the block to paste."""
    return printed(capsys, *arguments).partition("\n\nTo paste")[0].splitlines()


def test_what_is_measured_reads_back() -> None:
    key = DeviceKey.of("cpu")
    assert read_device_cost(key) == (None, "no times can be predicted yet; " + _remedy())
    path = write_device_cost(key, COST)
    assert path.parent.name == "devices"
    assert read_device_cost(key) == (COST, None)
    assert read_device_cost(replace(key, torch="0.0"))[0] is None
    assert read_device_cost(replace(key, cores=key.cores + 1))[0] is None


def _remedy() -> str:
    return "measure this device with 'batchinfer doctor --calibrate'"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"schema_version": 2', '"schema_version": 1'),
        ('"cores": ', '"cores": 1'),
        ('"start_seconds": 1.5', '"start_seconds": -1.5'),
        ('"start_seconds": 1.5', '"start_seconds": NaN'),
        ('"start_seconds": 1.5', '"start_seconds": "1.5"'),
        ('"start_seconds": 1.5,', ""),
        ('"start_seconds": 1.5', '"start_seconds": 1.5, "more": 1'),
        ('"number": 2e-06', '"number": Infinity'),
        ('"number": 2e-06', '"number": 1' + "0" * 400),
        ('"cache_bytes": 33554432.0', '"cache_bytes": 0'),
        ('"w8a8-int8": 1e-08', '"w4": 1e-08'),
        ('"seconds": {', '"seconds": [{'),
    ],
)
def test_a_damaged_file_is_not_used_and_that_is_said(before: str, after: str) -> None:
    key = DeviceKey.of("cpu")
    path = write_device_cost(key, COST)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    cost, why = read_device_cost(key)
    assert cost is None and why is not None
    assert str(path) in why and "doctor --calibrate" in why


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 2}'])
def test_another_file_is_not_used(content: bytes) -> None:
    key = DeviceKey.of("cpu")
    write_device_cost(key, COST).write_bytes(content)
    cost, why = read_device_cost(key)
    assert cost is None and why is not None and str(key.path) in why


def test_the_machine_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--device", "cpu")
    assert device.device_name("cpu") in out
    for name in ("memory", "batchinfer", "torch", "python", "8-bit products", "CPU instructions"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert _remedy() in out
    write_device_cost(DeviceKey.of("cpu"), COST)
    out = printed(capsys, "--device", "cpu")
    assert (
        "800 GOP/s" in out and "25.0 GB/s" in out and "34 MB of weights" in out and "error of fitted steps 5 %" in out
    )
    assert _remedy() not in out and "measure again" not in out


def test_the_path_of_the_kernels_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(figures(capsys, "--device", "cpu"))
    assert ("CPU path", cpu_path()) in lines
    if cpu_path() != "reference":
        assert "C compiler" not in str(lines) and "VNNI" not in str(lines)
    lines = told(figures(capsys, "--device", "cpu", "--cpu-path", "reference"))
    assert ("CPU path", "reference") in lines


def test_what_keeps_kernels_in_c_from_running_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    monkeypatch.setattr(linear_w8a8, "saturates", lambda: True)
    lines = told(figures(capsys, "--device", "cpu"))
    assert ("CPU path", "reference") in lines and ("missing", why_reference()) in lines
    assert "not built: install a C compiler" in why_reference()
    assert [text for name, text in lines if name == "missing" and "VNNI" in text]


def told(lines: list[str]) -> list[tuple[str, ...]]:
    return [tuple(re.split(r"\s{2,}", line, maxsplit=1)) for line in lines]


@pytest.mark.parametrize(
    ("measured", "asked", "known"),
    [
        ("0.2.dev3+g1a2b3c4", "0.2.dev4+g5d6e7f8.d20260101", True),
        ("0.2.dev4+g5d6e7f8", "0.2", True),
        ("0.1", "0.2.dev1+g1a2b3c4", False),
        ("0.0+unknown", "0.0+unknown", True),
        ("0.2", "0.2.1", False),
    ],
)
def test_figures_are_kept_from_commit_to_commit_and_measured_again_for_a_release(
    measured: str, asked: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_file, "__version__", measured)
    write_device_cost(DeviceKey.of("cpu"), COST)
    monkeypatch.setattr(device_file, "__version__", asked)
    assert (read_device_cost(DeviceKey.of("cpu"))[0] is not None) == known


def test_a_fit_that_is_far_off_is_doubted(capsys: pytest.CaptureFixture[str]) -> None:
    steps = COST.steps | {"bfloat16": StepCost({"step": 1e-3}, 0.4)}
    write_device_cost(DeviceKey.of("cpu"), replace(COST, steps=steps))
    lines = figures(capsys, "--device", "cpu")
    assert [line.split()[0] for line in lines if "measure again" in line] == ["bfloat16"]


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call(capsys, "doctor", "--device", "tpu")
    assert code == 2 and "tpu" in said
    if not device.cuda_devices():
        code, said = call(capsys, "doctor", "--device", "cuda")
        assert code == 65 and "cuda" in said


def test_measuring_keeps_what_it_finds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Real engines and real steps, of the smallest shape alone and one kind of products."""
    monkeypatch.setattr(calibrate, "SHAPES", ((128, 256, 2, 4, 2, 32, 256), (128, 256, 3, 4, 2, 32, 256)))
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 64,
    }
    few = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "hidden_size": 128}
    monkeypatch.setattr(calibrate, "WITH_STATES", calibrate.WITH_STATES | heads | few)
    monkeypatch.setattr(calibrate, "PRODUCTS", {name: PRODUCTS[name] for name in ("w8a8-int8", "w4a8")})
    monkeypatch.setattr(calibrate, "KV_CACHES", ("float32", "int8"))
    monkeypatch.setattr(calibrate, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(memory_speed, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(memory_speed, "LARGEST", 32 << 20)
    out = printed(capsys, "--device", "cpu", "--calibrate")
    key = DeviceKey.of("cpu")
    cost, why = read_device_cost(key)
    assert why is None and cost is not None
    assert set(cost.steps) == {"w8a8-int8", "w4a8"}
    seconds = cost.steps["w8a8-int8"].seconds
    assert {"filtered logit", "drawn logit", "decoding key in int8", "weight by 512 rows",
            "decoding state number"} <= set(seconds)  # fmt: skip
    assert sum(seconds.values()) > 0 and cost.start_seconds > 0
    assert "w8a8-int8 products" in out and str(key.path) in out
    assert json.loads(key.path.read_text())["measured_on"]["batchinfer"]


def test_the_block_for_a_bug_report_names_neither_paths_nor_the_machine(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    write_device_cost(DeviceKey.of("cpu"), COST)
    shown, _, block = printed(capsys, "--device", "cpu").partition("To paste into a bug report")
    assert str(cache) in shown and str(cache) not in block and "measured: (path)" in block
    assert all(line.split()[0] in block for line in shown.splitlines() if line)
    assert f"torch: {version('torch')}" in block and str(Path.home()) not in block
    assert platform.node() not in block.replace(platform.release(), "")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/a/b c", "(path) c"), ("~/x.json", "(path)"), ("15 GB/s", "15 GB/s"), ("x: /a, /b", "x: (path), (path)"),
        ("w8a8/w4a8", "w8a8/w4a8"), ("in '/a/b'", "in '(path)'"),
    ],
)  # fmt: skip
def test_paths_are_left_out(value: str, shown: str) -> None:
    assert doctor.PATH.sub("(path)", value) == shown
