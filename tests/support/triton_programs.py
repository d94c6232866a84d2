"""Counting the programs that Triton would compile on a GPU, without one: by the keys that Triton itself makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Programs:
    """The programs launched so far: a kernel's name, and by argument what a program is specialised to."""

    def __init__(self) -> None:
        self.kernels: dict[Any, tuple[str, list[str], Any]] = {}  # by function: its name, arguments and binder
        self.met: dict[str, set[tuple[Any, ...]]] = {}  # by kernel
        self.new: list[str] = []  # the kernel and what is new, of programs launched since the list was emptied

    def launch(self, function: InterpretedFunction[Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a launch."""
        if function.fn not in self.kernels:
            compiled = JITFunction(function.fn, **function.kwargs)
            binder = create_function_from_signature(compiled.signature, compiled.params, BACKEND)
            self.kernels[function.fn] = function.fn.__name__, list(compiled.signature.parameters), binder
        name, arguments, binder = self.kernels[function.fn]
        bound, specialized, left = binder(*args, **options)
        key = (*(bound[a] if s[0] == "constexpr" else s for a, s in zip(arguments, specialized, strict=True)),)
        key += tuple(sorted(left.items()))
        met = self.met.setdefault(name, set())
        if key not in met:
            nearest = min(met, key=lambda old: sum(a != b for a, b in zip(old, key, strict=True)), default=())
            names = [*arguments, *sorted(left)]
            what = [f"{n}: {a} -> {b}" for n, a, b in zip(names, nearest, key, strict=False) if a != b]
            self.new.append(f"{name}: {', '.join(what) or 'first'}")
            met.add(key)


@contextmanager
def programs() -> Iterator[Programs]:
    """Note launches within, and run none: what kernels would write stays as it is."""
    found, run = Programs(), InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.launch(self, args, options)

    InterpretedFunction.run = noted
    try:
        yield found
    finally:
        InterpretedFunction.run = run
