"""The flags of a job: each is declared here, once, and reaches `JobSpec`, the job file, the help and the docs.

`make reference` writes docs/flags.md again after a change.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from batchinfer.engine.config import (
    BLOCK_SIZE,
    BLOCK_SIZE_IN_C,
    BLOCK_SIZES,
    DTYPES,
    KV_CACHE_DTYPES,
    LEAST_BATCHED_TOKENS,
    LEAST_GPU_SHARE,
)
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.flag import Flag, flags_of
from batchinfer.formats.scheme import QUANTIZATIONS
from batchinfer.host.device import DEVICES, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
from batchinfer.jobs.chat_flags import ChatFlags
from batchinfer.jobs.flag_values import DELIMITER, ENCODING, MOMENT, NAMES, NUMBER_OR_AUTO, SHARD, TIME
from batchinfer.jobs.label_flags import LabelFlags
from batchinfer.jobs.log import FORMATS
from batchinfer.jobs.openai_batch_flags import OpenAIBatchFlags
from batchinfer.jobs.sampling_flags import SamplingFlags
from batchinfer.jobs.score_flags import ScoreFlags
from batchinfer.jobs.speculation import SpeculationFlags
from batchinfer.jobs.structure_flags import StructureFlags
from batchinfer.kernels.cpu_library import CPU_PATHS

GROUPS = ("Input", "Prompt", "Labels", "Structure", "Sampling", "Scores", "Model", "Engine", "Job", "Output")


@dataclass(frozen=True)
class JobFlags:
    """A user's choices for a job, except sampling and speculation. Paths and models are as the user gave them."""

    inputs: Annotated[
        tuple[Path, ...],
        Flag(
            "Read these Parquet, JSON Lines, CSV or TSV files, and all of them in these folders, as one table.",
            "Input",
            "INPUT",
            name="input",
            positional=True,
        ),
    ]
    output: Annotated[
        Path,
        Flag(
            "Write the answers to this file, Parquet or JSON Lines (.jsonl) by the suffix of its name, or, where the "
            "name has no suffix, to a folder of Parquet files. "
            "OUT.run/ beside it keeps the state of the run.",
            "Output",
            "OUT",
            short="-o",
        ),
    ]
    model: Annotated[
        str,
        Flag(
            "Run this model: a directory, a GGUF file, or a model on the Hub as ORG/NAME or ORG/NAME/FILE.gguf.",
            "Model",
            names_model=True,
        ),
    ]
    id_column: Annotated[
        str | None,
        Flag(
            "Identify each row by this column of unique values, and derive its random seed from that instead of from "
            "its prompt.",
            "Input",
            "COLUMN",
        ),
    ] = None
    csv_delimiter: Annotated[
        str | None,
        Flag(
            r"Split the lines of .csv files at this character instead of a comma; \t is a tab.", "Input", kind=DELIMITER
        ),
    ] = None
    csv_encoding: Annotated[
        str | None,
        Flag(
            "Read .csv and .tsv files in this encoding, such as cp1252 or utf-16, instead of UTF-8.",
            "Input",
            kind=ENCODING,
        ),
    ] = None
    where: Annotated[
        str | None,
        Flag(
            "Answer only the rows for which this expression over columns is true, as in "
            "'lang == \"de\" and length(review) > 20'; a comparison with null is not true.",
            "Input",
            "EXPRESSION",
        ),
    ] = None
    sample: Annotated[
        int | None,
        Flag(
            "Answer only N rows, drawn at random by --seed from those that --where leaves; all if there are no more.",
            "Input",
            at_least=1,
        ),
    ] = None
    limit: Annotated[
        int | None,
        Flag("Answer only the first N rows of those that --where and --sample leave.", "Input", at_least=1),
    ] = None
    shard: Annotated[
        tuple[int, int] | None,
        Flag(
            "Run only part I of N parts of the rows, with I from 0 to N - 1, and write it to OUT-I-of-N.",
            "Input",
            kind=SHARD,
        ),
    ] = None
    prompt_column: Annotated[
        str | None,
        Flag(
            "Take each prompt from this column. The column 'prompt' is taken if no flag says where prompts come from.",
            "Prompt",
            "COLUMN",
        ),
    ] = None
    prompt_template: Annotated[
        str | None, Flag("Make each prompt from columns, as in 'Summarize: {title}'.", "Prompt", "TEMPLATE")
    ] = None
    reorder_fields: Annotated[
        bool,
        Flag(
            "Put the lines of --prompt-template that hold columns into the order in which prompts begin alike for "
            "longest; the report says which. Lines change places with those next to them only.",
            "Prompt",
        ),
    ] = False
    messages_column: Annotated[
        str | None,
        Flag("Take each chat from this column, as a list of messages {role, content}.", "Prompt", "COLUMN"),
    ] = None
    tools_column: Annotated[
        str | None,
        Flag(
            "Offer each chat the tools in this column, as a list of JSON schemas. A null offers none.",
            "Prompt",
            "COLUMN",
        ),
    ] = None
    system_prompt: Annotated[str | None, Flag("Begin every chat with this system message.", "Prompt")] = None
    chat: Annotated[bool, Flag("Wrap each prompt in the model's chat template.", "Prompt")] = False
    template_date: Annotated[
        datetime | None,
        Flag(
            "Have the chat template take this for now, if it writes the date into prompts: a date, or a date and time, "
            "as 2026-11-28T09:30. If none is given, a job takes and keeps the moment at which it begins.",
            "Prompt",
            kind=MOMENT,
        ),
    ] = None
    allow_special_tokens: Annotated[
        bool,
        Flag(
            "Read control tokens that are spelled out in a prompt or a message as control tokens, not as plain text: "
            "for prompts to which a chat template was applied before, and for text that you trust.",
            "Prompt",
        ),
    ] = False
    tokenizer: Annotated[
        str | None, Flag("Take the tokenizer of this model instead of --model's own.", "Model", names_model=True)
    ] = None
    revision: Annotated[str | None, Flag("Load this branch, tag or commit of a model on the Hub.", "Model", "NAME")] = (
        None
    )
    quantization: Annotated[
        str,
        Flag(
            "Compute with weights and activations in few bits: w8a8-int8, w8a8-fp8 on a GPU, or w4a8 for a checkpoint "
            "in 4 bits; '+head' includes the output head. 'auto' does what the checkpoint says, 'none' computes in "
            "floating point.",
            "Model",
            "NAME",
            choices=QUANTIZATIONS,
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        Flag(
            "Compute in this type wherever nothing is quantized; 'auto' is the checkpoint's type.",
            "Model",
            "TYPE",
            choices=DTYPES,
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        str,
        Flag(
            "Store keys and values in this type; 'auto' stores them as they are computed.",
            "Engine",
            "TYPE",
            choices=KV_CACHE_DTYPES,
        ),
    ] = "auto"
    device: Annotated[
        str, Flag("Compute on this device; 'auto' takes a GPU if there is one.", "Engine", "NAME", choices=DEVICES)
    ] = "auto"
    cpu_path: Annotated[
        str,
        Flag(
            "On a CPU, compute with the kernels of this instruction set; 'auto' takes the fastest that runs here, and "
            "'reference' torch's operations alone. Rows of one job come from one of them.",
            "Engine",
            "NAME",
            choices=CPU_PATHS,
        ),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        Flag(
            "Allow at most N tokens of prompt and answer together; 'auto' is the checkpoint's limit.",
            "Engine",
            kind=NUMBER_OR_AUTO,
            at_least=2,
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        Flag(
            "Run at most N rows side by side; 'auto' is {cpu} on a CPU and {cuda} on a GPU.".format(**MAX_NUM_SEQS),
            "Engine",
            kind=NUMBER_OR_AUTO,
            at_least=1,
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        Flag(
            "Compute at most N tokens in one step; 'auto' is {cpu} on a CPU and {cuda} on a GPU.".format(
                **MAX_NUM_BATCHED_TOKENS
            ),
            "Engine",
            kind=NUMBER_OR_AUTO,
            at_least=LEAST_BATCHED_TOKENS,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        Flag(
            "Keep keys and values in blocks of N tokens, "
            f"{', '.join(map(str, BLOCK_SIZES))}; 'auto' is {BLOCK_SIZE_IN_C} with kernels in C on a CPU, and "
            f"{BLOCK_SIZE} elsewhere.",
            "Engine",
            kind=NUMBER_OR_AUTO,
            choices=BLOCK_SIZES,
        ),
    ] = None
    deterministic: Annotated[
        bool,
        Flag(
            "Compute the same bits for a row whatever runs beside it, also on a GPU, where this is slower. A CPU "
            "always does so.",
            "Engine",
        ),
    ] = False
    gpu_memory_utilization: Annotated[
        float,
        Flag(
            "Take at most this share of a GPU's memory for weights, computation, recorded steps, keys and values "
            "together.",
            "Engine",
            "SHARE",
            at_least=LEAST_GPU_SHARE,
            at_most=1,
        ),
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        int | None,
        Flag(
            "Take at most N bytes of memory for keys and values; 'auto' takes what is free.",
            "Engine",
            kind=NUMBER_OR_AUTO,
            at_least=1,
        ),
    ] = None
    step_timeout: Annotated[
        float,
        Flag(
            "Restart the engine when it has finished no step for this many seconds.", "Engine", above=0, unit="seconds"
        ),
    ] = 600.0
    commit_rows: Annotated[
        int, Flag("Commit finished rows to disk whenever N of them are there.", "Job", at_least=1)
    ] = 10_000
    commit_seconds: Annotated[
        float,
        Flag("Commit finished rows to disk after this many seconds at the latest.", "Job", above=0, unit="seconds"),
    ] = 30.0
    max_error_rate: Annotated[
        float,
        Flag("End the job when more than this share of the rows has failed.", "Job", "SHARE", at_least=0, at_most=1),
    ] = 1.0
    canary: Annotated[
        int,
        Flag(
            "Before the job begins, run N of the rows through the model with and without quantization and print how "
            "far the answers agree.",
            "Job",
            at_least=0,
        ),
    ] = 0
    canary_reference: Annotated[
        str | None,
        Flag(
            "Compare the rows of --canary with this model, where --model is a quantized checkpoint itself.",
            "Job",
            names_model=True,
        ),
    ] = None
    time_limit: Annotated[
        float | None,
        Flag(
            "Stop after this time with exit code 75, so that the same command can continue later. Write minutes, or "
            "[DAYS-]HH:MM:SS.",
            "Job",
            kind=TIME,
            above=0,
            unit="seconds",
        ),
    ] = None
    grace: Annotated[
        float,
        Flag("End within this many seconds after a signal or the time limit.", "Job", above=0, unit="seconds"),
    ] = 30.0
    retry_errors: Annotated[bool, Flag("Run the rows that failed in an earlier run again.", "Job")] = False
    resume: Annotated[
        bool, Flag("Continue an earlier run of this job; --no-resume refuses to start where there is one.", "Job")
    ] = True
    incremental: Annotated[
        bool,
        Flag(
            "Run only rows that are new or changed since the last run, and add them as one more file to the output "
            "folder.",
            "Job",
        ),
    ] = False
    reuse: Annotated[
        tuple[Path, ...],
        Flag(
            "Take the answers of rows with equal prompts, sampling and model from this output of an earlier job, with "
            "its run folder beside it; may be repeated.",
            "Job",
            "OUT",
        ),
    ] = ()
    metrics_textfile: Annotated[
        Path | None,
        Flag(
            "Write the job's figures into this file every minute, for the textfile collector of Prometheus' "
            "node_exporter.",
            "Job",
            "FILE.prom",
        ),
    ] = None
    log_format: Annotated[
        str,
        Flag(
            "Write each line of the log, the report and an error as text, or as a JSON object with time, level, event "
            "and figures, and no bar on a terminal.",
            "Job",
            choices=FORMATS,
        ),
    ] = "text"
    report_samples: Annotated[
        int, Flag("Show the answers of N rows in the report; by default it has no text of any row.", "Job", at_least=0)
    ] = 0
    columns: Annotated[
        tuple[str, ...] | None, Flag("Keep only these input columns in the output.", "Output", kind=NAMES)
    ] = None
    overwrite: Annotated[bool, Flag("Replace an earlier output and its run folder.", "Output")] = False


FLAGS = {
    **flags_of(SamplingParams),
    **flags_of(JobFlags),
    **flags_of(OpenAIBatchFlags),
    **flags_of(ChatFlags),
    **flags_of(LabelFlags),
    **flags_of(StructureFlags),
    **flags_of(SamplingFlags),
    **flags_of(SpeculationFlags),
}
"""All flags of `batchinfer run`, by field."""

OF_GENERATION = ("canary", "canary_reference", "reasoning_parser", "tool_parser")
SCORE_FLAGS = {
    **flags_of(ScoreFlags),
    **flags_of(LabelFlags),
    **{name: flag for name, flag in {**flags_of(JobFlags), **flags_of(ChatFlags)}.items() if name not in OF_GENERATION},
    "seed": flags_of(SamplingFlags)["seed"],
}
"""All flags of `batchinfer score`, by field: its own, and those of `run` that do not concern what is generated."""
