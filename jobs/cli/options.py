"""Flags that several commands have."""

from typing import Annotated

import typer

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
        help="auto (as the checkpoint says), none, w8a8-int8, w8a8-fp8 (GPUs), w4a8 (4-bit checkpoints); with '+head' "
        "the head too."
    ),
]
KvCacheDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8 or fp8.")]
MaxNumSeqs = Annotated[
    str, typer.Option(metavar="N|auto", help="Rows that run side by side, at most; auto: 64, on a GPU 1024.")
]
MaxNumBatchedTokens = Annotated[
    str, typer.Option(metavar="N|auto", help="Tokens of one step, at most; auto: 512, on a GPU 8192.")
]
Deterministic = Annotated[
    bool, typer.Option(help="A row has the same bits in any batch, on a GPU too; slower. The CPU always does so.")
]
GpuMemoryUtilization = Annotated[
    float, typer.Option(metavar="SHARE", help="Of a GPU's memory, for weights, steps, keys and values together.")
]
KvCacheMemoryBytes = Annotated[
    str, typer.Option(metavar="N|auto", help="Memory for keys and values, at most; auto: what is there.")
]
BlockSize = Annotated[int, typer.Option(help="Tokens of a block of the KV cache.")]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        metavar="JSON|METHOD",
        help="Who drafts tokens: off, auto, ngram, suffix, draft_model, or a JSON object with method, model, "
        "num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, gate. The output is the same.",
    ),
]
