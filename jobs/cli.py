"""The command line. An error is one line on stderr and an exit code, never a traceback.

The engine's process imports this module again, as part of the program that started it: so each command imports for
itself what is large.
"""

import json
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from batchinfer import __version__
from batchinfer.jobs.spec import EngineFailed, Interrupted, JobSpec, Refused, UsageError, read_job_file
from batchinfer.request import SamplingParams

USAGE, INTERNAL, IO_ERROR = 2, 70, 74
EXIT_CODES: dict[type[Exception], int] = {UsageError: USAGE, Refused: 65, EngineFailed: INTERNAL, Interrupted: 75}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main() -> NoReturn:
    """The entry point: runs a command and exits with its code."""
    try:
        sys.exit(app(prog_name="batchinfer", standalone_mode=False))
    except typer.TyperException as error:
        _fail(error.format_message(), USAGE)
    except (UsageError, Refused, EngineFailed, Interrupted) as error:
        _fail(str(error), EXIT_CODES[type(error)])
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", IO_ERROR)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="batchinfer-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        _fail(f"internal: {type(error).__name__}: {error}; the traceback is in {log.name}", INTERNAL)


def _fail(message: str, code: int) -> NoReturn:
    print(f"batchinfer: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"batchinfer {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run an LLM over a table of prompts, on one device: a table of prompts goes in, it comes out with answers."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _use_job_file(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        names = {str(parameter.name) for parameter in context.command.params} - {"config", "inputs"}
        values = read_job_file(path, names | {"input"})
        context.default_map = {"inputs" if key == "input" else key: value for key, value in values.items()}
    return path


Model = Annotated[
    str | None,
    typer.Option(help="A directory, a GGUF file, or a model on the Hub: ORG/NAME, or ORG/NAME/FILE.gguf."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Seed = Annotated[int, typer.Option(help="Every row's own seed comes from this one.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Of all that is not quantized: auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str,
    typer.Option(
        help="auto (as the checkpoint says), none, w8a8-int8, w4a8 (4-bit checkpoints); with '+head' the head too."
    ),
]
KvCacheDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Rows that run side by side, at most.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens of one step, at most.")]
BlockSize = Annotated[int, typer.Option(help="Tokens of a block of the KV cache.")]


@app.command()
def run(
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="INPUT...", help="Parquet, JSON Lines or CSV; several are one table.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="OUT.parquet; OUT.run/ is made beside it.")
    ] = None,
    model: Model = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another one than the model's own.")] = None,
    revision: Revision = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of prompts; 'prompt' if nothing is said.")
    ] = None,
    prompt_template: Annotated[str | None, typer.Option(help="A prompt made of columns: 'Summarize: {title}'.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="A column of lists of {role, content}.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="The first message of every chat.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    allow_special_tokens: Annotated[
        bool, typer.Option(help="Prompts may hold control tokens: rendered before.")
    ] = False,
    id_column: Annotated[str | None, typer.Option(help="Seeds come from this column instead of the prompt.")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Input columns to keep, comma-separated; else all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Do not end at end-of-text.")] = False,
    quantization: Quantization = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: Annotated[
        str, typer.Option(metavar="N|auto", help="Tokens of prompt and answer together, at most.")
    ] = "auto",
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 512,
    block_size: BlockSize = 32,
    commit_rows: Annotated[int, typer.Option(help="Commit finished rows when there are so many,")] = 10_000,
    commit_seconds: Annotated[float, typer.Option(help="or after so long.")] = 30.0,
    max_error_rate: Annotated[float, typer.Option(help="Give up when a larger share of the rows failed.")] = 1.0,
    canary: Annotated[
        int, typer.Option(metavar="N", help="First compare N of the rows with the model without quantization.")
    ] = 0,
    canary_reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this one: for a checkpoint that is quantized.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier output and its run folder.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(callback=_use_job_file, is_eager=True, help="A TOML file with these flags as keys."),
    ] = None,
) -> None:
    """Answer every row of a table: OUT.parquet has its rows, in order, and the answers."""
    if output is None or model is None:
        raise UsageError(f"{'--output' if output is None else '--model'} is missing")
    if prompt_template is None and messages_column is None:
        prompt_column = prompt_column or "prompt"
    from batchinfer.jobs import runner

    spec = JobSpec(
        inputs=tuple(inputs or ()),
        output=output,
        model=model,
        revision=revision,
        tokenizer=tokenizer,
        prompt_column=prompt_column,
        prompt_template=prompt_template,
        messages_column=messages_column,
        system_prompt=system_prompt,
        chat=chat,
        allow_special_tokens=allow_special_tokens,
        id_column=id_column,
        sampling=_sampling(max_tokens, temperature, top_k, top_p, min_p, tuple(stop or ()), ignore_eos),
        seed=seed,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=_tokens_or_auto(max_model_len),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        columns=tuple(name for names in columns for name in names.split(",") if name) if columns else None,
        commit_rows=commit_rows,
        commit_seconds=commit_seconds,
        max_error_rate=max_error_rate,
        overwrite=overwrite,
        canary=canary,
        canary_reference=canary_reference,
    )
    done = runner.run(spec)
    print(done.table())
    if done.rows and not done.rows_ok:
        raise Refused(f"every row failed; {output} has each one's error_code and error_message")


def _tokens_or_auto(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise UsageError(f"--max-model-len is {text!r}; it must be a number of tokens, or auto")
    return None if text == "auto" else int(text)


def _sampling(*values: Any) -> SamplingParams:
    max_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos = values
    try:
        return SamplingParams(max_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos)
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from error


@app.command()
def report(output: Annotated[Path, typer.Argument(metavar="OUT.parquet")]) -> None:
    """Print the report of a finished job again."""
    from batchinfer.jobs.report import read_report

    print(read_report(output).table())


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="A model on the Hub: ORG/NAME, or ORG/NAME/FILE.gguf.")],
    revision: Revision = None,
    to: Annotated[Path | None, typer.Option(help="A folder, instead of the Hub's cache.")] = None,
) -> None:
    """Download a model, for a machine that goes offline afterwards."""
    from batchinfer.jobs.hub import fetch_model

    print(fetch_model(model, revision, to))


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
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 512,
    block_size: BlockSize = 32,
) -> None:
    """Run prompts of random tokens through the path of a job."""
    from batchinfer.jobs import bench as benchmark

    engine = {
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "dtype": dtype,
        "device": device,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "block_size": block_size,
        "random_weights": random_weights,
    }
    workload = benchmark.Workload(num_prompts, input_len, output_len, seed, engine)
    result = benchmark.bench(model, revision, workload, stub)
    print(result.table())
    if output_json is not None:
        output_json.write_text(json.dumps(benchmark.figures(workload, result), indent=2) + "\n")


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
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 512,
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
    context: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 512,
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
    from batchinfer.jobs.parts import write_json
    from batchinfer.jobs.plot import layer_plot

    done = job.evaluate(model, reference, data, column, quantization, context, rows)
    print(done.table())
    if json_file is not None:
        write_json(json_file, asdict(done))
    if plot is not None:
        if done.layers is None:
            raise Refused(f"--plot {plot}: there is nothing to draw; the notes above say why")
        plot.write_text(layer_plot(done, done.layers), "utf-8")
