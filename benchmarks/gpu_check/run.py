"""All that can be found out about batchinfer only on a GPU: whether its kernels are right there, and how fast they are.

    PYTHONPATH=. python3 benchmarks/gpu_check/run.py --run 1 [--out FOLDER] [--smoke]

Run 1, at most 7 minutes: compiles every kernel in 16 processes, measures what the device can do, runs small cases
under compute-sanitizer, and compares kernels with float64 and engines with transformers. Run 2, at most 5 minutes:
kernels beside ceilings and the vendor's, jobs end to end on the shape of Llama-3-8B, the slowest kernels under ncu.
`--run transformers` compares with transformers' continuous batching, and `--run sweep` tries other tiles.

gpu_check.json and gpu_check.md are written as figures come, and what other runs have found stays in them. Exit code 1
if something failed, 2 without a device. `--smoke` runs all lines that need no device, on the CPU and in Triton's
interpreter; its figures mean nothing.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = {"TRITON_INTERPRET": "1", "BATCHINFER_KERNELS": "triton"}
# The interpreter multiplies by NumPy's OpenBLAS, whose code for newer processors adds up a row in an order that depends
# on the row's place in the tile: on a GPU it does not, and rows are held to that.
SMOKE = {**KERNELS, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_CORETYPE": "Nehalem"}
SMOKE_SECONDS = 2400
"""Seconds that a stage may take in a smoke test."""
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
# Without these the profiler may tear down what recorded graphs depend on.
PROFILED = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="1", help="1, 2, transformers or sweep; 1 if not given")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results if not given")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, in small sizes, for tests")
    for hidden, kind in (("child", str), ("parts", json.loads), ("into", Path), ("earlier", Path), ("seconds", float)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for name in KERNELS:
        os.environ.pop(name, None)
    os.environ.update({**QUIET, **PROFILED, **(SMOKE if args.smoke else {})})
    _find_modules()
    if args.cases:  # in a process that a tool watches
        from gpu_check.watched import run_cases

        return run_cases(args.smoke, args.cases)
    from gpu_check.stages import run_of, stage_of

    if args.child:
        from gpu_check.child import run_child

        return run_child(stage_of(args.child), args.parts, args.smoke, args.into, args.seconds, args.earlier)
    try:
        run = run_of(args.run)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes that we started are ended too
    if (missing := _missing(args.smoke)) is not None:
        print(f"gpu_check: {missing}", file=sys.stderr)
        return 2
    return _run(run, args.smoke, args.out or _default_folder(args.smoke), began)


def _run(run, smoke: bool, out: Path, began: float) -> int:
    """Run stages, and write results as they come; 1 if something failed."""
    from gpu_check.processes import run_parts
    from gpu_check.report import Results, stage_result

    out.mkdir(parents=True, exist_ok=True)
    results, failed = Results(out), []
    for i, stage in enumerate(run.stages):
        print(f"{stage.name}: {stage.title}", flush=True)
        started = time.monotonic()
        until = started + SMOKE_SECONDS if smoke else began + run.ends(stage)

        def keep(parts: list, stage=stage, started=started) -> dict:
            result = stage_result(stage.title, time.monotonic() - started, parts)
            results.put(stage.name, result)
            return result

        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            earlier = Path(folder) / "earlier.json"
            earlier.write_text(json.dumps([results.stages[s.name] for s in run.stages[:i]]))
            result = keep(run_parts(stage, smoke, Path(folder), until, earlier, keep))
        failed += [stage.name] if result["status"] == "failed" else []
        print(f"{stage.name}: {result['status']}, {result['seconds']} s", flush=True)
    print(results.summary())
    print(f"results: {results.json_file} and {results.page_file}")
    if failed:
        print(f"gpu_check: failed: {', '.join(failed)}; the errors are at the end of the results", file=sys.stderr)
    return 1 if failed else 0


def _missing(smoke: bool) -> str | None:
    """What keeps the check from running here."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{sys.executable} has no {error.name}; it needs torch, triton and transformers"
    if not smoke and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; --smoke runs without one, in small sizes"
    return None


def _default_folder(smoke: bool) -> Path:
    """A smoke test must not write over figures."""
    return Path(tempfile.mkdtemp(prefix="gpu-check-smoke-")) if smoke else ROOT / "benchmarks" / "results"


def _find_modules() -> None:
    """`gpu_check` and `batchinfer`, and nothing else of this repository.

    Its folder `kernels` must not be found where transformers looks for the package of that name, and this folder's
    files must hide no module.
    """
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (HERE, ROOT)]
    sys.path.insert(0, str(ROOT))
    import batchinfer  # noqa: F401

    sys.path[0:1] = []
    sys.path.append(str(HERE.parent))


if __name__ == "__main__":
    sys.exit(main())
