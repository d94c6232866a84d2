"""The commands about models: bring one, quantize it, measure it. Each imports for itself what is large."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.options import (
    BlockSize,
    Deterministic,
    Device,
    Dtype,
    GpuMemoryUtilization,
    KvCacheDtype,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    Quantization,
    Revision,
    Seed,
    SpeculativeConfig,
)
from batchinfer.jobs.cli.speculation import speculation_of
from batchinfer.jobs.flag_values import number_or_auto

app = typer.Typer()


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="A model on the Hub: ORG/NAME, or ORG/NAME/FILE.gguf.")],
    revision: Revision = None,
    to: Annotated[Path | None, typer.Option(help="A folder, instead of the Hub's cache.")] = None,
) -> None:
    """Download a model, for a machine that goes offline afterwards."""
    from batchinfer.models.hub import fetch_model

    print(fetch_model(model, revision, to))


def _use_recipe(context: typer.Context, name: str | None) -> str | None:
    if name is not None:
        from batchinfer.jobs.quantize import read_recipe

        context.default_map = read_recipe(name)
    return name


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint in floating point: a folder, or the name of a Hub model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the quantized checkpoint.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            callback=_use_recipe, is_eager=True, help="A name that `batchinfer recipes` lists, or a TOML file."
        ),
    ] = None,
    scheme: Annotated[str, typer.Option(help="w4a16, w4a8, w8a16, w8a8-int8 or w8a8-fp8.")] = "w4a16",
    method: Annotated[
        str, typer.Option(help="rtn, rtn-mse; calibrated: rtn-importance, gptq, awq, smoothquant.")
    ] = "rtn-mse",
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; 0 for whole channels. w4a16 and w4a8 have 128.")
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="Spread outliers over all channels first.")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Parquet, JSON Lines or CSV with rows like those to come; else the standard library's text."),
    ] = None,
    calibration_column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    calibration_rows: Annotated[int, typer.Option(help="Rows to draw.")] = 128,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a row, at most; 512, or the model's context if that is shorter.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the rows and the rotation.")] = 0,
    revision: Revision = None,
) -> None:
    """Make a quantized checkpoint, in the compressed-tensors format. The same command goes on where it stopped."""
    from batchinfer.jobs import quantize as job

    rows = job.CalibrationRows(calibration, calibration_column, calibration_rows, calibration_tokens, seed)
    print(job.quantize(model, revision, output, scheme, method, group_size, rows, rotate).table())


@app.command()
def recipes() -> None:
    """List the recipes for `batchinfer quantize`, a line each."""
    from batchinfer.jobs.quantize import RECIPES, read_recipe

    for path in sorted(RECIPES.glob("*.toml")):
        print(f"{path.stem:<23}{read_recipe(path.stem)['description']}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file, or a model on the Hub.")],
    data: Annotated[Path, typer.Option(help="Parquet, JSON Lines or CSV.")],
    column: Annotated[str, typer.Option(help="The column with the text.")],
    reference: Annotated[str | None, typer.Option(help="Another model: how far is this one from it?")] = None,
    quantization: Quantization = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; 512, or what the model takes. Windows do not overlap.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Only so many rows, from the first.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the errors by layer; with --reference.")
    ] = None,
) -> None:
    """Measure a model on text: perplexity, bits per byte, and its distance from a reference."""
    if plot is not None and reference is None:
        raise UsageError(f"--plot {plot} shows each layer's distance from a reference: name one with --reference")
    if plot is not None and plot.suffix != ".svg":
        raise UsageError(f"--plot is {plot}; its name must end in .svg")
    from batchinfer.jobs import evaluate as job
    from batchinfer.jobs.plot import layer_plot
    from batchinfer.jobs.results.durable import write_json

    done = job.evaluate(model, reference, data, column, quantization, context, rows)
    print(done.table())
    if json_file is not None:
        write_json(json_file, asdict(done))
    if plot is not None:
        if done.layers is None:
            raise Refused(f"--plot {plot}: there is nothing to draw; the notes above say why")
        plot.write_text(layer_plot(done, done.layers), "utf-8")


@app.command()
def bench(
    model: Model = None,
    revision: Revision = None,
    random_weights: Annotated[bool, typer.Option(help="Noise instead of weights: config.json is enough.")] = False,
    stub: Annotated[bool, typer.Option(help="No engine: measure the job layer alone.")] = False,
    num_prompts: Annotated[int, typer.Option(help="Rows.")] = 256,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 256,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    output_json: Annotated[Path | None, typer.Option(help="Write the figures and the whole report here.")] = None,
    seed: Seed = 0,
    quantization: Quantization = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_seqs: MaxNumSeqs = "auto",
    max_num_batched_tokens: MaxNumBatchedTokens = "auto",
    block_size: BlockSize = 32,
    deterministic: Deterministic = False,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    speculative_config: SpeculativeConfig = None,
) -> None:
    """Run prompts of random tokens through the path of a job."""
    from batchinfer.jobs import bench as benchmark

    engine = {
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": dtype,
        "device": device,
        "max_num_seqs": number_or_auto("--max-num-seqs", max_num_seqs),
        "max_num_batched_tokens": number_or_auto("--max-num-batched-tokens", max_num_batched_tokens),
        "block_size": block_size,
        "deterministic": deterministic,
        "gpu_memory_utilization": gpu_memory_utilization,
        "speculation": speculation_of(speculative_config, None),
        "random_weights": random_weights,
    }
    workload = benchmark.Workload(num_prompts, input_len, output_len, seed, engine)
    result = benchmark.bench(model, revision, workload, stub)
    print(result.table())
    if output_json is not None:
        output_json.write_text(json.dumps(benchmark.figures(workload, result), indent=2) + "\n")
