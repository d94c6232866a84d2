"""llama.cpp: `llama-batched-bench`, built for this machine from the source that llama-cpp-python's sdist carries."""

import json
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

from contender import Contender
from environment import Environment, run
from workload import THREADS, Rates, Workload

PACKAGE = "llama-cpp-python==0.3.36"
ENVIRONMENT = Environment("llama-cpp", ("cmake==4.4.4", "gguf==0.19.0"))
SOURCE = ENVIRONMENT.folder / "src"
PROGRAMS = ENVIRONMENT.folder / "build" / "bin"
MODELS = ENVIRONMENT.folder / "models"

QUANTIZATIONS = ("Q4_0", "Q8_0")
SETTINGS = {
    "512 tokens a micro-batch": ("-fa", "on", "-ub", "512"),
    "128 tokens a micro-batch": ("-fa", "on", "-ub", "128"),
}
BEST = ("Q4_0", "512 tokens a micro-batch")


def prepare() -> str:
    """Build the programs and write the models where they are missing; return the versions used."""
    ENVIRONMENT.install()
    if not SOURCE.exists():
        _unpack_source()
    if not (PROGRAMS / "llama-batched-bench").exists():
        _build()
    if not all(_model(quantization).exists() for quantization in QUANTIZATIONS):
        _write_models()
    commit = re.search(r"llama\.cpp@([0-9a-f]+)", (SOURCE / "CHANGELOG.md").read_text())
    return f"llama.cpp {commit[1] if commit else 'of unknown commit'} from {PACKAGE}"


def contenders() -> list[Contender]:
    return [
        Contender(
            f"llama.cpp {quantization}",
            setting,
            partial(_measure, quantization, arguments),
            best=(quantization, setting) == BEST,
        )
        for quantization in QUANTIZATIONS
        for setting, arguments in SETTINGS.items()
    ]


def _model(quantization: str) -> Path:
    return MODELS / f"{quantization}.gguf"


def _unpack_source() -> None:
    downloads = ENVIRONMENT.folder / "downloads"
    fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", PACKAGE]
    run([str(ENVIRONMENT.python), "-m", *fetch, "--dest", str(downloads)])
    (archive,) = downloads.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(downloads / "unpacked", filter="data")
    (root,) = (downloads / "unpacked").iterdir()
    root.rename(SOURCE)
    shutil.rmtree(downloads)


def _build() -> None:
    cmake = str(ENVIRONMENT.folder / "bin" / "cmake")
    build = str(PROGRAMS.parent)
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"]
    unneeded = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]
    run([cmake, "-S", str(SOURCE / "vendor" / "llama.cpp"), "-B", build, *options, *unneeded])
    parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    targets = ["--target", "llama-quantize", "--target", "llama-batched-bench"]
    run([cmake, "--build", build, "--parallel", parallel, *targets])


def _write_models() -> None:
    """Random weights in 16 bits, then llama.cpp's own quantizer, which also chooses the type of the output head."""
    MODELS.mkdir(exist_ok=True)
    unquantized = MODELS / "F16.gguf"
    script = Path(__file__).with_name("llama_cpp_model.py")
    run([str(ENVIRONMENT.python), str(script), str(unquantized)])
    for quantization in QUANTIZATIONS:
        run([str(PROGRAMS / "llama-quantize"), str(unquantized), str(_model(quantization)), quantization])
    unquantized.unlink()


def _measure(quantization: str, arguments: tuple[str, ...], workload: Workload) -> Rates:
    """The first new token comes from the prefill, so the decode phase has one token a request less.

    A smaller batch runs first, as warm-up.
    """
    threads = str(THREADS)
    rows, decoded = workload.num_prompts, workload.output_len - 1
    context = rows * (workload.input_len + decoded)
    program = [str(PROGRAMS / "llama-batched-bench"), "-m", str(_model(quantization)), "--output-format", "jsonl"]
    options = ["-c", str(context), "-t", threads, "-tb", threads, *arguments]
    work = ["-npp", str(workload.input_len), "-ntg", str(decoded), "-npl", f"{max(1, rows // 8)},{rows}"]
    output = run([*program, *options, *work])
    _warm_up, measured = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return Rates.of(workload, measured["t_pp"], measured["t_tg"], rows * decoded)
