"""The data-set card of a folder output for the Hugging Face Hub: YAML for its page, and text on how rows were made.

It lies in the run folder and not among the rows: pyarrow, pandas and polars refuse a folder of Parquet files that has a
README.md. Format of the YAML: huggingface_hub's `DatasetCardData`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.report import Report

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # between which the Hub sorts numbers of rows
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "n")


def dataset_card(spec: Mapping[str, Any], report: Report, model: Path) -> str:
    """Return the card of a job's output.

    `spec` has the fields of its `JobSpec` as a dictionary, as `run.json` has them, and `model` is the folder or file of
    the checkpoint that ran.
    """
    from huggingface_hub import DatasetCardData  # loads PyYAML, which other jobs have no use for

    data = DatasetCardData(
        pretty_name=Path(report.output).name,
        size_categories=[_size(report.rows)],
        tags=["synthetic", "batchinfer"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "part-*.parquet"}]}],
    )
    return "\n".join(["---", data.to_yaml(), "---", *_body(spec, report, licence_of(model))]) + "\n"


def licence_of(model: Path) -> str | None:
    """Return the licence that the model card of a checkpoint names, if it has a card and that names one."""
    card = (model if model.is_dir() else model.parent) / "README.md"
    if not card.is_file():
        return None
    yaml = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    found = None if yaml is None else re.search(r"^license: *[\"']?([^\"'\n]+)", yaml[1], re.MULTILINE)
    return None if found is None else found[1].strip()


def _body(spec: Mapping[str, Any], report: Report, licence: str | None) -> Iterator[str]:
    yield f"\n# {Path(report.output).name}\n"
    yield f"{count_of(report.rows, 'row')}, answered by a language model with batchinfer {__version__}.\n"
    yield "| | |\n|---|---|"
    named = "not named by its checkpoint" if licence is None else licence
    facts = {
        "model": spec["model"],
        "licence of the model": f"{named}; see what it says of generated text",
        "quantization": spec["quantization"],
        "rows with an answer": f"{report.rows_ok:,}",
        "rows that failed": f"{report.rows_failed:,}, with `error_code` and `error_message`",
        "tokens": f"{report.prompt_tokens:,} of prompts, {report.completion_tokens:,} generated",
        "sampling": ", ".join(f"{name} {value}" for name, value in _sampling(spec)),
    }
    yield from (f"| {name} | {_cell(str(value))} |" for name, value in facts.items())
    yield "\n## Prompts\n"
    if spec["system_prompt"] is not None:
        yield f"System message:\n\n{_block(spec['system_prompt'])}\n"
    if spec["prompt_template"] is not None:
        yield f"Made of columns by this template:\n\n{_block(spec['prompt_template'])}"
    elif spec["messages_column"] is not None:
        yield f"The chats in column `{spec['messages_column']}`."
    else:
        yield f"The texts in column `{spec['prompt_column'] or spec['text_column'] or 'prompt'}`."
    if spec["chat"] or spec["messages_column"] is not None:
        yield "\nThey were rendered with the model's chat template."


def _sampling(spec: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for name in SAMPLED:
        yield name, spec["sampling"].get(name, spec.get(name))


def _size(rows: int) -> str:
    """Return the Hub's name of a size: n<1K, 1K<n<10K and so on."""
    for i, bound in enumerate(1000 * 10**i for i in range(len(SIZES))):
        if rows < bound:
            return f"{SIZES[i - 1]}<n<{SIZES[i]}" if i else f"n<{SIZES[0]}"
    return f"n>{SIZES[-1]}"


def _cell(text: str) -> str:
    """Return text that stays in its cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _block(text: str) -> str:
    """Return text between fences that are longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
