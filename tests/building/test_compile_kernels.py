"""Compiling the kernels in C: by which compiler, what is left out, and that all libraries give equal bits."""

import ctypes
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import compile_kernels
import numpy as np
import pytest
import torch
from compile_kernels import FLAGS, KERNELS, SETS, architecture, compile_into, system_compiler, zig
from torch import Tensor

from batchinfer.kernels import cpu_library, rows_cpu
from batchinfer.kernels.attention_cpu import WindowedBatch, attention
from batchinfer.kernels.cpu_library import cpu_path, load, why_reference
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.kv_cache_cpu import rotate_and_store
from batchinfer.kernels.linear_w4a8_cpu import PackedW4A8
from batchinfer.kernels.linear_w8a8_cpu import PackedW8A8
from batchinfer.kernels.norm import LayerNorm
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.sampling_cpu import sample

MACHINE = architecture()
WARNINGS = ("-Wall", "-Wextra", "-Werror")

needs_kernels = pytest.mark.skipif(not MACHINE, reason="there are no kernels in C for this machine")
needs_compiler = pytest.mark.skipif(not MACHINE or system_compiler() is None, reason="this system has no C compiler")
needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None and "CI" not in os.environ, reason="ziglang is not installed"
)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_compiler
def test_the_sources_give_no_warnings() -> None:
    compiler = system_compiler()
    assert compiler is not None
    for flags in SETS[MACHINE].values():
        command = [*compiler, *FLAGS.split(), *flags.split(), *WARNINGS, "-fsyntax-only", *KERNELS.glob("*_cpu.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@needs_kernels
def test_a_set_that_the_compiler_does_not_know_is_left_out(tmp_path: Path) -> None:
    *known, unknown = SETS[MACHINE]
    fails = f'case "$*" in *cpu_{unknown}.so*) echo "cc: error: no such instructions" >&2; exit 1;; esac'
    compiler = script(tmp_path / "cc", f'{fails}\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"')
    (line,) = compile_into(tmp_path, [str(compiler)], MACHINE)
    assert f"for {unknown}, which are left out: cc: error: no such instructions" in line
    assert sorted(path.name for path in tmp_path.glob("*.so")) == sorted(f"cpu_{name}.so" for name in known)


@needs_kernels
def test_the_compiler_is_the_one_that_is_named_if_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    broken, works = script(tmp_path / "broken", "exit 1"), script(tmp_path / "gcc", "exit 0")
    script(tmp_path / "cc", "exit 1")
    assert system_compiler() == ["gcc"]
    monkeypatch.setenv("CC", f"{works} -m64")
    assert system_compiler() == [str(works), "-m64"]
    monkeypatch.setenv("CC", str(broken))
    assert system_compiler() == ["gcc"]


def test_without_a_compiler_old_libraries_go_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_kernels, "KERNELS", tmp_path)
    monkeypatch.setattr(compile_kernels, "_works", lambda compiler: False)
    (tmp_path / "cpu_avx2.so").write_bytes(b"of an older version")
    (line,) = compile_kernels.compile_kernels()
    assert ("no C compiler was found" if MACHINE else "there are no kernels in C for") in line
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    assert cpu_path() == "reference" and "install a C compiler" in why_reference()


def test_another_architecture_has_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_kernels, "KERNELS", tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert compile_kernels.compile_kernels() == [
        f"there are no kernels in C for {sys.platform} on sparc64: torch computes what they would"
    ]


@needs_zig
@pytest.mark.long(minutes=3)
@pytest.mark.parametrize("machine", SETS)
def test_zig_compiles_for_each_architecture(machine: str, tmp_path: Path) -> None:
    assert list(compile_into(tmp_path, zig(machine, tmp_path), machine, *WARNINGS)) == []
    libraries = {f"cpu_{name}.so": tmp_path / f"cpu_{name}.so" for name in SETS[machine]}
    for library in libraries.values():
        header = library.read_bytes()[:20]
        assert header[:4] == b"\x7fELF" and header[18] == {"x86_64": 62, "aarch64": 183}[machine]  # e_machine


@needs_zig
@needs_compiler
@pytest.mark.long(minutes=4)
def test_all_compilers_and_instruction_sets_give_equal_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = system_compiler()
    assert system is not None
    digests = {}
    for name, compiler in {"system": system, "zig": zig(MACHINE, tmp_path / "cache")}.items():
        folder = tmp_path / name
        folder.mkdir()
        assert list(compile_into(folder, compiler, MACHINE, *WARNINGS)) == []
        monkeypatch.setattr(cpu_library, "FOLDER", folder)
        for path in SETS[MACHINE]:
            if not cpu_library._missing(path):
                torch.manual_seed(0)
                digests[name, path] = [sha256(out.numpy()).hexdigest() for out in _outputs(load.__wrapped__(path))]
    assert len(digests) >= 2, why_reference()
    first = next(iter(digests.values()))
    assert digests == dict.fromkeys(digests, first)
    assert len(set(first)) == len(first) > 20, "each output differs from each other one"


def _outputs(library: ctypes.CDLL) -> Iterator[Tensor]:
    """Yield what each kernel computes from random numbers, as bytes."""
    for kv in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        for dtype in (torch.float32, torch.bfloat16):
            yield from map(_bytes, _attention(library, dtype, kv))
    for dtype in rows_cpu.TYPES:
        for takes in (dtype, torch.uint8):
            weight, bias = torch.randn(2, 83).to(dtype)
            for norm in (weight, LayerNorm(weight, bias)):
                x, y = torch.randn(2, 7, 83).to(dtype)
                rows = rows_cpu.add_norm(library, x, Rows(y, torch.rand(7, 1)), norm, 1e-6, takes)
                yield from map(_bytes, (x, *_parts(rows)))
            for activation in rows_cpu.ACTIVATIONS:
                x = (torch.randn(9, 2 * 77) * 20).to(dtype)
                rows = rows_cpu.activate(library, Rows(x, torch.rand(9, 1)), activation, gated=True, takes=takes)
                yield from map(_bytes, _parts(rows))
    weight, scale = torch.randint(-127, 128, (53, 200), dtype=torch.int8), torch.rand(53)
    for count in (1, 5, 16, 70):
        rows = Rows(torch.randint(0, 256, (count, 200), dtype=torch.uint8), torch.rand(count, 1))
        yield _bytes(PackedW8A8(library, weight, scale)(rows).values)
    weight = torch.randint(-8, 8, (144, 672), dtype=torch.int8)
    for count in (1, 5, 16, 70):
        rows = Rows(torch.randint(0, 256, (count, 672), dtype=torch.uint8), torch.rand(count, 1))
        for zero_point in (torch.zeros(144, 21), torch.randint(-8, 8, (144, 21)).float()):
            yield _bytes(PackedW4A8(library, weight, torch.rand(144, 21), zero_point)(rows).values)
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (50, 0.9, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.02)):
        filters = (torch.full((40,), top_k), torch.full((40,), top_p), torch.full((40,), min_p))
        drawn = SamplingBatch(torch.ones(40), *filters, torch.randint(-(1 << 62), 1 << 62, (40,)), torch.arange(40))
        yield _bytes(sample(library, torch.randn(40, 20_011), drawn)[0])
    yield _bytes(sample(library, torch.randn(40, 3001), None)[0])


def _attention(library: ctypes.CDLL, dtype: torch.dtype, kv: torch.dtype) -> Iterator[Tensor]:
    """Yield queries, the keys and values stored beside them, and the attention over those, with a shared prefix."""
    heads, kv_heads, size, tokens = 6, 2, 48, 100
    cache = KVCache(8, kv_heads, 32, size, kv, keys_by_column=True)
    slots, angles = torch.randperm(7 * 32)[:tokens] + 32, torch.randn(tokens, size // 2)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype)
    norms = torch.randn(2, size).to(dtype)
    query = rotate_and_store(
        library, qkv, cache, heads, angles.cos(), angles.sin(), slots, [*norms], norm_values=False, eps=1e-6
    )
    scales = (scale for scale in (cache.key_scale, cache.value_scale) if scale is not None)
    yield from (query, cache.key.transpose(2, 3), cache.value, *scales)
    table = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 5]], dtype=torch.int32)
    offsets, contexts = np.array([0, 20, 50]), np.array([90, 128])
    batch = WindowedBatch(RaggedBatch(offsets, contexts, table, (SharedPrefix(0, 2, 32),)), None)
    yield attention(library, query[:50], cache, batch, size**-0.5, 5.0, torch.randn(heads))
    windowed = WindowedBatch(RaggedBatch(offsets, contexts, table), 24)
    yield attention(library, query[:50], cache, windowed, size**-0.5, None, None)


def _parts(rows: Rows) -> list[Tensor]:
    return [part for part in (rows.values, rows.scale) if part is not None]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
