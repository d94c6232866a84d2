"""All that can be found out about batchinfer only on a GPU: whether its kernels are right there, and how fast they are.

    PYTHONPATH=. python3 benchmarks/gpu_check/run.py [--stages 1,2] [--out FOLDER] [--smoke]

1 kernels against references, 2 the engine against transformers, 3 kernels against ceilings, 4 jobs end to end, 5 beside
transformers' continuous batching, 6 inside a step. Each takes less than four minutes on an H100. Writes gpu_check.json
and gpu_check.md, in which stages that ran before stay. Exit code 1 if a stage failed, 2 without a device.

`--smoke` runs all lines that need no device, on the CPU and in Triton's interpreter; its figures mean nothing.
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
SMOKE = {"TRITON_INTERPRET": "1", "BATCHINFER_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
# Without these the profiler may tear down what recorded graphs depend on.
PROFILED = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="", help="numbers, with commas between; all of them if not given")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results if not given")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, in small sizes, for tests")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help="that a stage may take; 240 if not given")
    args = parser.parse_args(arguments)
    for name in SMOKE.keys() - {"CUDA_VISIBLE_DEVICES"}:
        os.environ.pop(name, None)
    os.environ.update({**QUIET, **PROFILED, **(SMOKE if args.smoke else {})})
    _find_modules()
    from gpu_check.stages import SECONDS, stages_of

    try:
        stages = stages_of(args.child or args.stages)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if args.child:
        from gpu_check.child import run_child

        return run_child(stages[0], args.parts, args.smoke, args.into, args.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes that we started are ended too
    if (missing := _missing(args.smoke)) is not None:
        print(f"gpu_check: {missing}", file=sys.stderr)
        return 2
    seconds = args.seconds or (SECONDS if not args.smoke else 10 * SECONDS)
    return _run(stages, args.smoke, args.out or _default_folder(args.smoke), seconds)


def _run(stages: list, smoke: bool, out: Path, seconds: float) -> int:
    """Run stages, write results after each; 1 if one of them failed."""
    from gpu_check.processes import run_parts
    from gpu_check.report import Results, stage_result

    out.mkdir(parents=True, exist_ok=True)
    results, failed = Results(out), []
    for stage in stages:
        print(f"stage {stage.number}: {stage.title}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            parts = run_parts(stage, smoke, Path(folder), seconds)
        result = stage_result(stage.title, time.monotonic() - began, parts)
        results.put(stage.number, result)
        failed += [str(stage.number)] if result["status"] == "failed" else []
        print(f"stage {stage.number}: {result['status']}, {result['seconds']} s", flush=True)
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
