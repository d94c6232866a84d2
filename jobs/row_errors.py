"""What each error code of a row means and what to do about it: for the report's advice, and for the reference page.

python -m batchinfer.jobs.row_errors > docs/errors.md
"""

from collections.abc import Iterator
from dataclasses import dataclass

from batchinfer.errors import EXIT_CODES


@dataclass(frozen=True)
class RowErrorKind:
    """An error code. Its texts stand behind "the row failed, because" and "to mend it,"."""

    meaning: str
    remedy: str


AGAIN = "correct them, then give --retry-errors"
IN_THE_FILE = "correct the line, and run the job anew, since the file is another one then"

ROW_ERRORS = {
    "null_prompt": RowErrorKind("their prompts are null", "leave them out with --where, or fill the column"),
    "empty_prompt": RowErrorKind("their prompts have no tokens", "leave them out with --where"),
    "too_long": RowErrorKind(
        "their prompts, or prompts and texts to score together, have more tokens than --max-model-len has room for",
        "raise it if the model can take it, or shorten the prompts",
    ),
    "too_large": RowErrorKind("their prompts are larger than any model takes", "shorten them, or leave them out"),
    "wrong_type": RowErrorKind("their prompts are no text", "convert the column to text"),
    "invalid_utf8": RowErrorKind("their texts are not UTF-8", "give --csv-encoding for CSV, or mend the file"),
    "bad_messages": RowErrorKind(
        "their chats are no lists of messages with a known role and with text", "bring them into that form"
    ),
    "bad_tools": RowErrorKind("their tools are no lists of JSON schemas", "bring them into that form"),
    "bad_chat_template_kwargs": RowErrorKind(
        "the arguments of their chat template are no objects of plain values", "bring them into that form"
    ),
    "bad_labels": RowErrorKind("their labels are too few, empty or the same", AGAIN),
    "bad_schema": RowErrorKind("their JSON schemas are not valid, or ask for what is not supported", AGAIN),
    "bad_grammar": RowErrorKind("their grammars cannot be followed by this model's tokens", AGAIN),
    "bad_sampling_params": RowErrorKind("their own sampling params are not valid", AGAIN),
    "bad_token_ids": RowErrorKind("their token ids are outside the model's vocabulary", "take ids of this model"),
    "empty_completion": RowErrorKind("the texts to score have no tokens", "leave them out with --where"),
    "empty_text": RowErrorKind(
        "the texts to score have a single token, which nothing comes before", "leave them out with --where"
    ),
    "not_finite": RowErrorKind(
        "the model computed no finite numbers for them, or every token was banned",
        "try --dtype float32 or no --quantization, and look at their bans",
    ),
    "engine_died": RowErrorKind(
        "the engine died over each of them alone, twice", "see worker.log in the run folder, then give --retry-errors"
    ),
    "bad_line": RowErrorKind("the line of the batch file lacks a field, or has one that is wrong", IN_THE_FILE),
    "invalid_json_line": RowErrorKind("the line of the batch file is not JSON", IN_THE_FILE),
    "duplicate_custom_id": RowErrorKind("an earlier line of the batch file has the same custom_id", IN_THE_FILE),
    "unsupported_url": RowErrorKind("the line asks for something other than completions", IN_THE_FILE),
    "model_mismatch": RowErrorKind(
        "the line names another model than --model", "give --any-model and --overwrite to answer it anyway"
    ),
    "unknown_field": RowErrorKind("the request has a field that no version of the API has", IN_THE_FILE),
    "unsupported_field": RowErrorKind("the request asks for what is not supported", IN_THE_FILE),
    "bad_value": RowErrorKind("a field of the request has a value of the wrong kind or size", IN_THE_FILE),
    "no_chat_template": RowErrorKind(
        "the request is a chat, and the model has no chat template", "give one with --chat-template"
    ),
}
"""Error codes, those that only requests of batch files have at the end."""

EXITS = {
    0: "the command did what it was asked to",
    2: "a flag or a key of the job file is wrong",
    65: "the data, the model, the output or the system cannot be used as asked, or every row failed",
    70: "the engine failed or died, or batchinfer has a fault",
    74: "the disk or another part of the system failed",
    75: "the job was told to stop, or another run is at work; the same command goes on",
    130: "a second Ctrl-C ended the job at once",
}

HEAD = """\
# Errors

<!-- Made by `make reference` from jobs/row_errors.py: change that, not this page. -->

A row that fails has an `error_code` and an `error_message` in the output, and the job goes on. The message names the
field, the value and the bound. `--retry-errors` runs the rows that failed again, and only these.

| error_code | rows failed because | to mend it |
|---|---|---|
"""


def page() -> str:
    """Return the reference page, as Markdown."""
    assert EXITS.keys() == {0, *EXIT_CODES.values()}
    rows = (f"| `{code}` | {kind.meaning} | {kind.remedy} |" for code, kind in ROW_ERRORS.items())
    return HEAD + "\n".join([*rows, *_exits()]) + "\n"


def _exits() -> Iterator[str]:
    yield from ("", "A command ends with one of these exit codes:", "", "| exit code | |", "|---:|---|")
    yield from (f"| {code} | {meaning} |" for code, meaning in EXITS.items())


if __name__ == "__main__":
    print(page(), end="")
