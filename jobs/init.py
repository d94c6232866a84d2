"""`batchinfer init`: looks at a table and at the models at hand, and writes a job file with comments."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.amounts import count_of, in_bytes, in_seconds
from batchinfer.jobs.local_models import LocalModel, has_chat_template, local_models
from batchinfer.jobs.outlook import Outlook
from batchinfer.jobs.results.durable import write_whole
from batchinfer.jobs.table_guess import Guess, guess, is_batch_file
from batchinfer.jobs.tables.table import Table

MOST_LISTED = 5  # models that the file names
EXAMPLE = "ORG/NAME"


def write_job_file(inputs: Sequence[Path], path: Path, overwrite: bool) -> bool:
    """Write a job file for a table. Returns whether it names a model, so that it can be planned as it is.

    Raises `Refused` if the table cannot be read, or if there is such a file already, and `UsageError` for a file of
    another kind.
    """
    if path.suffix != ".toml":
        raise UsageError(f"--output is {path}; a job file's name must end in .toml")
    if path.exists() and not overwrite:
        raise Refused(f"{path} exists; give --overwrite to replace it, or another name with --output")
    batch = is_batch_file(tuple(inputs))
    table = Table.open(inputs, lines=batch)
    found = Guess("batch") if batch else guess(table)
    models = local_models(Path())
    if found.kind in ("batch", "messages"):
        models = _for_chats(models)
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    chats = bool(models) and found.kind in ("prompt", "text") and has_chat_template(models[0].name)
    lines = [
        *_head(path, table, found),
        *_table(inputs, folder, found),
        *_model(models, folder),
        *_answers(found, chats or not models),
    ]
    write_whole(path, ("\n".join(lines) + "\n").encode())
    return bool(models) and found.kind != "none"


def _for_chats(models: list[LocalModel]) -> list[LocalModel]:
    """Put the smallest model with a chat template first, if there is one."""
    first = next((model for model in models if has_chat_template(model.name)), None)
    return models if first is None else [first, *(model for model in models if model != first)]


def add_plan(path: Path, plan: Outlook | str) -> None:
    """Add to a job file, as comments, what its plan says, or why there is none."""
    lines = [f"No plan can be made yet: {plan}"] if isinstance(plan, str) else list(_planned(plan))
    write_whole(path, path.read_bytes() + "\n".join(["", *(f"# {line}" for line in lines), ""]).encode())


def _planned(plan: Outlook) -> Iterator[str]:
    yield "What `batchinfer plan` says of it:"
    lengths = f"{count_of(plan.median_prompt, 'token')} in the median, {plan.longest_prompt:,} at most"
    yield f"{count_of(plan.rows_to_run, 'row')} can run" + (f"; prompts have {lengths}." if plan.rows_to_run else ".")
    for code, failing in plan.rows_failing.items():
        rows = count_of(failing.rows, "row")
        yield f"{rows} will fail with {code}, first row {failing.first}: docs/errors.md says why."
    if plan.duplicates or plan.shared_tokens:
        duplicates = count_of(plan.duplicates, "duplicate row")
        yield f"Computed only once: {duplicates}, and {count_of(plan.shared_tokens, 'shared prompt token')}."
    if plan.prediction is None:
        yield "How long it takes is known once `batchinfer doctor --calibrate` has measured this machine."
    else:
        low, high = in_seconds(plan.prediction.low), in_seconds(plan.prediction.high)
        yield f"It takes about {in_seconds(plan.prediction.wall_seconds)}; generating takes {low} to {high}."


def _head(path: Path, table: Table, found: Guess) -> Iterator[str]:
    yield f"# batchinfer run --config {path.name}"
    yield "# Keys are the flags of `batchinfer run`; paths are relative to this file. docs/flags.md lists all."
    yield f"# The table has {count_of(table.num_rows, 'row')} in {count_of(len(table.files), 'file')}."
    if found.kind == "none":
        yield "# No column of text was found in it: name one below."
    elif found.nulls:
        yield f"# Column {found.column} is null in {found.nulls:,} of the first {found.rows:,} rows, which then fail."
        if found.column.isidentifier():  # others cannot stand in a condition
            yield f"# To leave them out: where = {_text(f'{found.column} is not None')}"
    yield ""


def _table(inputs: Sequence[Path], folder: Path, found: Guess) -> Iterator[str]:
    names = [_text(os.path.relpath(each, folder)) for each in inputs]
    yield f"input = {names[0]}" if len(names) == 1 else f"input = [{', '.join(names)}]"
    first = inputs[0].resolve()
    name = first.name if first.is_dir() else first.stem
    yield f"output = {_text(f'{name}-responses.jsonl' if found.kind == 'batch' else f'{name}-answers.parquet')}"
    yield ""
    match found.kind:
        case "batch":
            yield "# Each line is a request in the format of OpenAI's batch API, with a model and sampling of its own."
            yield "openai-batch = true"
            yield "any-model = true"
        case "messages":
            yield "# Conversations, as lists of messages {role, content}."
            yield f"messages-column = {_text(found.column)}"
        case "prompt":
            yield "# The whole prompt stands in this column."
            yield f"prompt-column = {_text(found.column)}"
        case "text":
            yield "# Say what to do with each row, before or after its text; {name} is the value of a column."
            others = ", ".join("{" + name + "}" for name in found.others[:MOST_LISTED])
            yield from [f"# Further columns of text: {others}."] if others else []
            yield f"prompt-template = {_text('{' + found.column + '}')}"
        case _:
            yield '# prompt-column = "NAME"'
    if found.id_column is not None:
        yield "# Rows are known by this column: a row keeps its random seed when others are added or left out."
        yield f"id-column = {_text(found.id_column)}"
    yield ""


def _model(models: Sequence[LocalModel], folder: Path) -> Iterator[str]:
    if not models:
        yield "# No model was found here. Name a folder, a GGUF file, or a model on the Hub."
        yield f'# model = "{EXAMPLE}"'
    else:
        yield "# The smallest model found here that fits the table. Larger ones mostly answer better, and take longer."
        yield f"model = {_text(_from(models[0].name, folder))}"
        for model in models[1:MOST_LISTED]:
            yield f"# model = {_text(_from(model.name, folder))}  # {in_bytes(model.nbytes)}"
    yield '# quantization = "w8a8-int8"  # faster on a CPU; `batchinfer run --canary 16` tells what it changes'


def _answers(found: Guess, chats: bool) -> Iterator[str]:
    if found.kind == "batch":
        return
    yield ""
    if found.kind in ("prompt", "text"):
        yield "# Wrap each prompt in the model's chat template; models that only continue text have none."
        yield f"chat = {str(chats).lower()}"
    yield "# An answer ends after so many tokens at the latest."
    yield "max-tokens = 256"
    yield '# choices = ["positive", "negative"]  # answer with the likeliest of these, and say how likely it is'
    yield '# json-schema = "schema.json"  # answers that are JSON of this form'
    yield "# temperature = 0.7  # draw tokens; without it the likeliest one is taken"


def _from(name: str, folder: Path) -> str:
    """Return a model's name as the job file has it: paths are relative to that file."""
    return os.path.relpath(Path(name), folder) if name.startswith(".") else name


def _text(value: str) -> str:
    """Return a TOML string; JSON's strings are such."""
    return json.dumps(value, ensure_ascii=False)
