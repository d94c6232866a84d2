"""Choosing a job's parsers of answers, where its flags leave that to the chat template."""

from collections.abc import Sequence
from dataclasses import replace

from batchinfer.errors import UsageError
from batchinfer.jobs.spec import JobSpec
from batchinfer.text import reasoning
from batchinfer.text.answer_formats import closes_thinking, reasoning_format_of, thinking_tags, tool_format_of
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.tokenizer import Tokenizer


def with_parsers(spec: JobSpec, templates: Sequence[ChatTemplate], tokenizer: Tokenizer) -> tuple[JobSpec, list[str]]:
    """Return the job with the parsers that 'auto' stands for, and notes for the log and the report.

    `templates` are the chat templates of the job, the one for tools last. Raises `UsageError` for --max-thinking-tokens
    where there are no tags to close thinking by.
    """
    notes: list[str] = []
    structured = spec.sampling.structure is not None or spec.json_schema_column is not None
    if spec.chooses or structured:  # an answer has no room for thinking or calls, from its first token on
        reasoning_parser, tool_parser = (
            "none" if name == "auto" else name for name in (spec.reasoning_parser, spec.tool_parser)
        )
        spec, notes = (
            replace(spec, reasoning_parser=reasoning_parser, tool_parser=tool_parser),
            _no_room(spec, templates),
        )
    if spec.reasoning_parser == "auto":
        name, said = _reasoning_parser(spec, templates)
        spec, notes = replace(spec, reasoning_parser=name), said
    if spec.tool_parser == "auto":
        name, said = _tool_parser(spec, templates)
        spec, notes = replace(spec, tool_parser=name), notes + said
    if spec.sampling.max_thinking_tokens or spec.sampling_params_column is not None:
        try:
            tags = thinking_tags(tokenizer, spec.reasoning_format)
        except ValueError as error:
            if spec.sampling.max_thinking_tokens:
                raise UsageError(f"--max-thinking-tokens {error}") from error
            return spec, notes  # rows that limit their thinking get an error
        spec = replace(spec, sampling=replace(spec.sampling, thinking_tags=tags))
    return spec, notes


def _no_room(spec: JobSpec, templates: Sequence[ChatTemplate]) -> list[str]:
    """Return a note if the model thinks, before answers that leave it no room for that."""
    arguments = spec.chat_template_kwargs or {}
    if not templates or spec.arguments_differ:
        return []
    name = reasoning_format_of(templates[0], arguments)
    if name is None or closes_thinking(templates[0], arguments, name):
        return []
    answers = "labels" if spec.chooses else "answers that follow a form"
    return [
        f"the model thinks before it answers, as its chat template tells, and {answers} leave no room for that: tell "
        """it not to, as with --chat-template-kwargs '{"enable_thinking": false}'"""
    ]


def _reasoning_parser(spec: JobSpec, templates: Sequence[ChatTemplate]) -> tuple[str, list[str]]:
    if not templates:
        return "none", []
    template, arguments = templates[0], spec.chat_template_kwargs or {}
    name = reasoning_format_of(template, arguments)
    if name is None:
        tags = [tag for tag in reasoning.FORMATS["think"].marks if tag in template.source]
        hint = "the chat template knows thinking tags, but does not show whether the model thinks: if it does, give "
        return "none", [f"{hint}--reasoning-parser think"] if tags else []
    by = f"--reasoning-parser {name}, told by the chat template"
    if not spec.arguments_differ and closes_thinking(template, arguments, name):
        return "none", [f"answers have no thinking, since the prompts close it ({by})"]
    place = "the field 'reasoning_content'" if spec.openai_batch else "the column 'reasoning'"
    return name, [f"thinking goes to {place} ({by})"]


def _tool_parser(spec: JobSpec, templates: Sequence[ChatTemplate]) -> tuple[str, list[str]]:
    if not templates or not spec.offers_tools or not templates[-1].reads_tools:
        return "none", []
    name = tool_format_of(templates[-1])
    if name is None:
        place = "the text of answers" if spec.openai_batch else "generated_text"
        return "none", [f"tool calls stay in {place}: the chat template shows no format that is known"]
    what = "field" if spec.openai_batch else "column"
    return name, [f"tool calls go to the {what} 'tool_calls' (--tool-parser {name}, told by the chat template)"]
