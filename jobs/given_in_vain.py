"""Finding what a job gives its chat templates that they never read."""

from collections.abc import Sequence

import pyarrow as pa

from batchinfer.jobs.spec import JobSpec
from batchinfer.text.chat import ChatTemplate


def given_in_vain(spec: JobSpec, templates: Sequence[ChatTemplate], schema: pa.Schema) -> list[str]:
    """Return notes for the log and the report. `templates` are those of the job, the one for tools last; `schema` is
    that of its table, whose structs tell the names of the arguments in them."""
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
    if (column := spec.chat_template_kwargs_column) is not None and pa.types.is_struct(
        kind := schema.field(column).type
    ):
        given[f"--chat-template-kwargs-column {column}"] = [field.name for field in kind]
    read = frozenset().union(*(template.reads for template in templates))
    for flag, names in given.items():
        if unread := [name for name in names if name not in read]:
            notes.append(f"the chat template {which} never reads {', '.join(unread)}: given in vain by {flag}")
    return notes
