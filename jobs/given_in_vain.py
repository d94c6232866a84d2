"""Finding what a job gives its chat templates that they never read."""

from collections.abc import Sequence

from batchinfer.jobs.rows.conversations import read_arguments
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.text.chat import ChatTemplate

FIRST_ROWS = 1000  # rows whose arguments are looked at


def given_in_vain(spec: JobSpec, templates: Sequence[ChatTemplate], table: Table) -> list[str]:
    """Return notes for the log and the report. `templates` are those of the job, the one for tools last."""
    if not templates:
        return []
    which = str(spec.chat_template or f"of {spec.tokenizer or spec.model}")
    tools = {"--tools": spec.tools, "--tools-column": spec.tools_column}
    notes = [
        f"the chat template {which} never reads tools: {flag} {value} is in vain"
        for flag, value in tools.items()
        if value is not None and not templates[-1].reads_tools
    ]
    given = {"--chat-template-kwargs": list(spec.chat_template_kwargs or {})}
    if (column := spec.chat_template_kwargs_column) is not None:
        given[f"--chat-template-kwargs-column {column}"] = _names_in(table, column)
    read = frozenset().union(*(template.reads for template in templates))
    for flag, names in given.items():
        if unread := [name for name in names if name not in read]:
            notes.append(f"the chat template {which} never reads {', '.join(unread)}: given in vain by {flag}")
    return notes


def _names_in(table: Table, column: str) -> list[str]:
    """Return the names of the arguments in the first rows of a column."""
    _, batch = next(table.batches([column], FIRST_ROWS), (0, None))
    rows = [] if batch is None else read_arguments(batch, column, {}).values()
    return list(dict.fromkeys(name for row in rows for name in row))
