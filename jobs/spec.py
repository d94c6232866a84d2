"""The specification of a job: all choices of `batchinfer run`, and checks of which choices fit together."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from batchinfer.engine.config import Speculation
from batchinfer.engine.sampling_params import MOST_LOGPROBS, SamplingParams
from batchinfer.errors import UsageError
from batchinfer.flag import flags_of, problems
from batchinfer.jobs.chat_flags import ChatFlags
from batchinfer.jobs.flags import JobFlags
from batchinfer.jobs.label_flags import LabelFlags
from batchinfer.jobs.openai_batch_flags import OpenAIBatchFlags
from batchinfer.jobs.sampling_flags import MAX_SAMPLES, SamplingFlags
from batchinfer.jobs.score_flags import ScoreFlags
from batchinfer.jobs.structure_flags import StructureFlags

# What the requests of a batch file say themselves, or what concerns a table's columns.
OF_TABLES = (
    *("id_column", "csv_delimiter", "csv_encoding", "where", "prompt_column", "prompt_template", "messages_column"),
    *("chat", "tools", "tools_column", "chat_template_kwargs_column", "choices", "choices_column", "columns"),
    *("choice_probabilities", "json_schema_column", "sampling_params_column", "output_columns", "incremental"),
    "reorder_fields",
)
URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")


@dataclass(frozen=True)
class JobSpec(JobFlags, OpenAIBatchFlags, ChatFlags, LabelFlags, StructureFlags, SamplingFlags, ScoreFlags):
    """A job's flags and settings: those of `batchinfer run`, or of `score`.

    Raises `UsageError`, naming flag, value, bound and remedy, if they do not fit.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    # The fields of `sampling` that the user set: they win over the checkpoint's own settings.
    sampling_given: tuple[str, ...] = ()
    samples_by_row: bool = False  # rows may say how many samples they have
    # The model of `speculation` is a directory or a Hub id, as the user gave it.
    speculation: Speculation = field(default_factory=Speculation)
    # `run` has no flags for these settings: benchmarks set them.
    random_weights: bool = False
    prefix_sharing: bool = True
    learned_admission: bool = True
    deduplicate: bool = True  # rows that must have the same answer are computed once

    def __post_init__(self) -> None:
        for flag, problem in problems(self):
            raise UsageError(f"{flag.option} {problem}")
        _check_openai_batch(self)
        _check_prompt_source(self)
        _check_chat(self)
        _refuse_urls(self)
        _check_files(self)
        _check_lengths(self)
        _check_shard(self)
        _check_canary(self)
        _check_labels(self)
        _check_structure(self)
        _check_thinking(self)
        _check_incremental(self)

    @property
    def adds_file(self) -> bool:
        """True if this is an incremental job, which adds a file to its output folder. The run that makes that file is
        an ordinary job, whose output is the file."""
        return self.incremental and not self.output.suffix

    @property
    def renders_chats(self) -> bool:
        """True if the model's chat template makes prompts."""
        return self.chat or self.messages_column is not None or self.openai_batch

    @property
    def offers_tools(self) -> bool:
        """True if chats are offered tools, or may be."""
        return self.tools is not None or self.tools_column is not None or self.openai_batch

    @property
    def arguments_differ(self) -> bool:
        """True if rows may give the chat template arguments of their own."""
        return self.chat_template_kwargs_column is not None or self.openai_batch

    @property
    def sampled_by_row(self) -> bool:
        """True if rows may have sampling params of their own."""
        return self.sampling_params_column is not None or self.openai_batch

    @property
    def lists_samples(self) -> bool:
        """True if the output has all samples of a row in a column of their own."""
        return self.n > 1 or self.samples_by_row

    @property
    def most_logprobs(self) -> int:
        """Most likeliest tokens that a row may ask for beside each token of its answer; -1 if it may have no
        log-probabilities."""
        return MOST_LOGPROBS if self.openai_batch else self.sampling.logprobs

    @property
    def most_samples(self) -> int:
        """Most samples that a row may have."""
        return MAX_SAMPLES if self.samples_by_row else self.n

    @property
    def computed_samples(self) -> int:
        """Number of samples that are computed of a row without params of its own: one at temperature 0, since all are
        the same then."""
        return self.n if self.sampling.temperature > 0 else 1


def _check_openai_batch(job: JobSpec) -> None:
    if job.any_model and not job.openai_batch:
        raise UsageError("--any-model is about the requests of --openai-batch; give that too, or leave it out")
    if not job.openai_batch:
        return
    for name in OF_TABLES:
        if getattr(job, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is about a table, and a line of --openai-batch is a whole request; leave "
                "it out"
            )
    if job.sampling.wants_scores:
        name = "logprobs" if job.sampling.logprobs >= 0 else "prompt-logprobs"
        raise UsageError(
            f"--{name} is not for --openai-batch, whose requests ask for logprobs themselves; leave it out"
        )


def _check_prompt_source(job: JobSpec) -> None:
    if job.openai_batch:
        return
    sources = {
        "--prompt-column": job.prompt_column,
        "--prompt-template": job.prompt_template,
        "--messages-column": job.messages_column,
    }
    if job.scores_texts:
        sources["--text-column"] = job.text_column
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"give one of {', '.join(sources)}; got {' and '.join(given) or 'none'}")
    if job.reorder_fields and job.prompt_template is None:
        raise UsageError(
            f"--reorder-fields orders the lines of --prompt-template, and prompts come from {given[0]}; leave it out"
        )
    if job.text_column is not None and job.completion_column is not None:
        raise UsageError("--completion-column has texts behind a prompt, and --text-column whole ones; leave one out")
    if job.text_column is not None and job.renders_chats:
        raise UsageError("--chat makes prompts, and a text of --text-column has none; leave --chat out")


def _check_chat(job: JobSpec) -> None:
    if job.chat and job.messages_column is not None:
        raise UsageError("--chat wraps a plain prompt, but --messages-column has whole chats; leave one of them out")
    for_chats = {
        "--system-prompt": job.system_prompt,
        "--tools-column": job.tools_column,
        "--tools": job.tools,
        "--chat-template": job.chat_template,
        "--chat-template-kwargs": job.chat_template_kwargs,
        "--chat-template-kwargs-column": job.chat_template_kwargs_column,
    }
    for flag, value in for_chats.items():
        if value is not None and not job.renders_chats:
            raise UsageError(f"{flag} needs --chat or --messages-column; give one of them, or leave it out")
    if job.tools is not None and job.tools_column is not None:
        raise UsageError("--tools offers every chat the same tools, --tools-column each its own; leave one of them out")


def _refuse_urls(job: JobSpec) -> None:
    """Refuse paths like s3://bucket/table, of which pathlib leaves one slash, and models like that."""
    for name, flag in flags_of(JobFlags).items():
        given = getattr(job, name) if flag.is_path or flag.names_model else None
        for path in given if isinstance(given, tuple) else (given,):
            if path is not None and URL.match(str(path)):
                remedy = "give its id on the Hub, or a folder" if flag.names_model else "copy it here"
                raise UsageError(
                    f"{flag.option} is {path}, which begins like a URL: only files of this machine are read and "
                    f"written; {remedy}"
                )


def _check_files(job: JobSpec) -> None:
    if not job.inputs:
        raise UsageError("no input; give one file or more")
    _check_suffix(job.output)
    output = os.path.realpath(job.output)
    if any(f"{os.path.realpath(path)}{os.sep}".startswith(f"{output}{os.sep}") for path in job.inputs):
        raise UsageError(f"--output {job.output} is an input too, or contains one; choose another name")
    folders = [path for path in job.inputs if os.path.isdir(path)]
    if any(output.startswith(f"{os.path.realpath(path)}{os.sep}") for path in folders):
        raise UsageError(f"--output {job.output} is in an input folder; choose another folder")
    if any(os.path.realpath(path) == output for path in job.reuse):
        raise UsageError(f"--reuse {job.output} is the --output itself; leave it out: the same command goes on with it")
    if job.columns is not None and not job.columns:
        raise UsageError("--columns is empty; name one input column or more, or leave it out to keep all")
    if job.metrics_textfile is not None and job.metrics_textfile.suffix != ".prom":
        raise UsageError(f"--metrics-textfile is {job.metrics_textfile}; its name must end in .prom")


def _check_lengths(job: JobSpec) -> None:
    least, most = job.sampling.min_tokens, job.sampling.max_tokens
    if "min_tokens" in job.sampling_given and least > most:
        raise UsageError(f"--min-tokens is {least}; it must be at most --max-tokens, which is {most}")


def _check_shard(job: JobSpec) -> None:
    if job.shard is not None and not 0 <= job.shard[0] < job.shard[1]:
        index, count = job.shard
        raise UsageError(
            f"--shard is {index}/{count}; shards are counted from 0: give one from 0/{count} to {count - 1}/{count}"
        )


def _check_canary(job: JobSpec) -> None:
    if job.canary_reference is not None and not job.canary:
        raise UsageError("--canary-reference needs --canary N, with the number of rows to compare")


def _check_thinking(job: JobSpec) -> None:
    """Refuse what concerns thinking where labels or a form leave no room for it."""
    names = ("choices", "choices_column", "json_schema_column")
    forms = [*(name for name in names if getattr(job, name)), *(job.sampling.structure or ())[:1]]
    if not forms:
        return
    form = f"--{forms[0].replace('_', '-')}"
    if job.reasoning_parser not in ("auto", "none"):
        raise UsageError(
            f"--reasoning-parser {job.reasoning_parser} looks for thinking, and {form} leaves none; leave one out"
        )
    if job.sampling.max_thinking_tokens:
        raise UsageError(f"--max-thinking-tokens closes thinking, and {form} leaves none; leave one of them out")


def _check_labels(job: JobSpec) -> None:
    if job.choices and job.choices_column is not None:
        raise UsageError(
            "--choices gives every row the same labels, --choices-column each its own; leave one of them out"
        )
    if job.chooses and job.scores_texts:
        text = "--text-column" if job.completion_column is None else "--completion-column"
        raise UsageError(f"{text} has a text for each row, and rows choose from labels; leave one of them out")
    if job.choice_probabilities and not job.chooses:
        raise UsageError(
            "--choice-probabilities needs --choices or --choices-column; give one of them, or leave it out"
        )
    if not job.chooses:
        return
    given = [f"--{name.replace('_', '-')}" for name in job.sampling_given]
    columns = {"json_schema_column": job.json_schema_column, "sampling_params_column": job.sampling_params_column}
    given += [f"--{name.replace('_', '-')}" for name, column in columns.items() if column is not None]
    given += ["--draft-model"] if job.speculation.model is not None else []
    for flag in [*given, *(["--n"] if job.n > 1 else []), *(["--canary"] if job.canary else [])]:
        raise UsageError(f"{flag} is for answers that are generated, and rows choose from labels; leave it out")


def _check_structure(job: JobSpec) -> None:
    structure = job.sampling.structure
    if job.output_columns and job.sampling.json_schema is None:
        raise UsageError("--output-columns needs --json-schema, whose properties become columns; leave it out")
    if job.json_schema_column is None:
        return
    if structure is not None:
        raise UsageError(
            f"--{structure[0].replace('_', '-')} gives every answer the same form, --json-schema-column each its own; "
            "leave one of them out"
        )
    if job.sampling.ignore_eos:
        raise UsageError("--ignore-eos goes on after the end of an answer, and a schema ends it; leave it out")


def _check_incremental(job: JobSpec) -> None:
    if not job.incremental:
        return
    if job.id_column is None:
        raise UsageError("--incremental needs --id-column: it recognizes new rows by id and content")
    against = {"--shard": job.shard is not None, "--overwrite": job.overwrite, "--no-resume": not job.resume}
    for flag, wanted in against.items():
        if wanted:
            raise UsageError(f"--incremental adds to the earlier output; leave {flag} out")
    if job.sample is not None:
        raise UsageError(
            f"--incremental with --sample {job.sample} would add rows each time, since a table that has grown has "
            "another sample; leave one of them out"
        )


def _check_suffix(output: Path) -> None:
    from batchinfer.jobs.results.formats import format_of  # imports pyarrow, which --help does without

    format_of(output)


def sharded(output: Path, index: int, count: int) -> Path:
    """Return the output of shard `index` of `count`: OUT-I-of-N with the same suffix, or the folder OUT-I-of-N."""
    return output.with_name(f"{output.stem}-{index}-of-{count}{output.suffix}")
