"""The commands about models: fetch, quantize, evaluate, bench. Each imports large modules only when it runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from batchinfer.errors import Refused, UsageError
from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import SectionedCommand, takes
from batchinfer.jobs.speculation import speculation_of

ENGINE_FLAGS = (
    *(
        "quantization",
        "kv_cache_dtype",
        "dtype",
        "device",
        "cpu_path",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
    ),
    *("deterministic", "gpu_memory_utilization"),
)

app = typer.Typer()


@app.command(cls=SectionedCommand)
@takes("revision")
def fetch(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model on the Hub to download: ORG/NAME, or ORG/NAME/FILE.gguf."),
    ],
    revision: str | None,
    to: Annotated[Path | None, Flag("Download into this folder instead of the Hub's cache.", metavar="FOLDER")] = None,
) -> None:
    """Download a model, for a machine that goes offline afterwards."""
    from batchinfer.models.hub import fetch_model

    print(fetch_model(model, revision, to))


def _use_recipe(context: typer.Context, name: str | None) -> str | None:
    if name is not None:
        from batchinfer.jobs.quantize import read_recipe

        context.default_map = read_recipe(name)
    return name


@app.command(cls=SectionedCommand)
@takes("revision")
def quantize(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The checkpoint in floating point: a directory, or a model on the Hub."),
    ],
    revision: str | None,
    output: Annotated[Path, Flag("Write the quantized checkpoint into this folder.", metavar="FOLDER", short="-o")],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            callback=_use_recipe,
            is_eager=True,
            help="Take scheme, method, group size and rotation from this recipe: a name that `batchinfer recipes` "
            "lists, or a TOML file. Flags that are given win over the recipe.",
        ),
    ] = None,
    scheme: Annotated[
        str, Flag("Store weights in this scheme: w4a16, w4a8, w8a16, w8a8-int8 or w8a8-fp8.", metavar="NAME")
    ] = "w4a16",
    method: Annotated[
        str,
        Flag(
            "Round weights by this method: rtn or rtn-mse, or with calibration rtn-importance, gptq, awq or "
            "smoothquant.",
            metavar="NAME",
        ),
    ] = "rtn-mse",
    group_size: Annotated[
        int | None,
        Flag(
            "Let N columns share a scale; 0 gives each whole channel one. The schemes of 4 bits have 128 if "
            "nothing is given, the others 0."
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the weights first, which spreads outliers over all channels.")
    ] = False,
    calibration: Annotated[
        Path | None,
        Flag(
            "Calibrate with rows of this Parquet, JSON Lines or CSV file, which should be like those of later "
            "jobs. If no file is given, the source text of Python's standard library is used."
        ),
    ] = None,
    calibration_column: Annotated[
        str, Flag("Take the text for calibration from this column.", metavar="COLUMN")
    ] = "text",
    calibration_rows: Annotated[int, Flag("Draw N rows for calibration.")] = 128,
    calibration_tokens: Annotated[
        int | None,
        Flag(
            "Use at most N tokens of each row for calibration; 512 if nothing is given, or the model's context "
            "where that is shorter."
        ),
    ] = None,
    seed: Annotated[int, Flag("Draw the rows for calibration, and the rotation, with this random seed.")] = 0,
) -> None:
    """Make a quantized checkpoint in the compressed-tensors format.

    Given again after an interruption, the same command continues where it stopped.
    """
    from batchinfer.jobs import quantize as job

    rows = job.CalibrationRows(calibration, calibration_column, calibration_rows, calibration_tokens, seed)
    print(job.quantize(model, revision, output, scheme, method, group_size, rows, rotate).table())


@app.command()
def recipes() -> None:
    """List the recipes for `batchinfer quantize`, one on a line."""
    from batchinfer.jobs.quantize import RECIPES, read_recipe

    for path in sorted(RECIPES.glob("*.toml")):
        print(f"{path.stem:<23}{read_recipe(path.stem)['description']}")


@app.command(cls=SectionedCommand)
@takes("quantization", "kv_cache_dtype")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model to measure: a directory, a GGUF file, or a model on the Hub."),
    ],
    data: Annotated[Path, Flag("Read the text from this Parquet, JSON Lines or CSV file.")],
    column: Annotated[str, Flag("Take the text from this column.", metavar="COLUMN")],
    quantization: str,
    kv_cache_dtype: str,
    reference: Annotated[
        str | None, Flag("Measure how far the model is from this other one.", names_model=True)
    ] = None,
    context: Annotated[
        int | None,
        Flag(
            "Cut the text into windows of N tokens that do not overlap; 512 if nothing is given, or what the "
            "model takes where that is less."
        ),
    ] = None,
    rows: Annotated[int | None, Flag("Read only the first N rows.")] = None,
    json_file: Annotated[Path | None, Flag("Write the figures to this JSON file.", name="json")] = None,
    plot: Annotated[
        Path | None, Flag("Draw the error of each layer into this file; needs --reference.", metavar="FILE.svg")
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

    done = job.evaluate(model, reference, data, column, quantization, kv_cache_dtype, context, rows)
    print(done.table())
    if json_file is not None:
        write_json(json_file, asdict(done))
    if plot is not None:
        if done.layers is None:
            raise Refused(f"--plot {plot}: there is nothing to draw; the notes above say why")
        plot.write_text(layer_plot(done, done.layers), "utf-8")


@app.command(cls=SectionedCommand)
@takes("model", "revision", "seed", *ENGINE_FLAGS, "speculative_config")
def bench(
    model: str | None,
    revision: str | None,
    seed: int,
    speculative_config: str,
    random_weights: Annotated[
        bool, Flag("Fill the model with random weights, so that config.json is all that it needs.")
    ] = False,
    stub: Annotated[bool, Flag("Leave the engine out, and measure the job around it alone.")] = False,
    num_prompts: Annotated[int, Flag("Run N prompts.")] = 256,
    input_len: Annotated[int, Flag("Make each prompt of N tokens.")] = 256,
    output_len: Annotated[int, Flag("Generate N tokens for each prompt.")] = 64,
    output_json: Annotated[Path | None, Flag("Write the figures and the whole report to this JSON file.")] = None,
    **engine: Any,
) -> None:
    """Measure how fast this machine runs a model: a job over prompts of random tokens."""
    from batchinfer.jobs import bench as benchmark

    engine |= {"speculation": speculation_of(speculative_config, None), "random_weights": random_weights}
    workload = benchmark.Workload(num_prompts, input_len, output_len, seed, engine)
    result = benchmark.bench(model, revision, workload, stub)
    print(result.table())
    if output_json is not None:
        output_json.write_text(json.dumps(benchmark.figures(workload, result), indent=2) + "\n")
