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
        help="auto (as the checkpoint says), none, w8a8-int8, w4a8 (4-bit checkpoints); with '+head' the head too."
    ),
]
KvCacheDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Rows that run side by side, at most.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens of one step, at most.")]
BlockSize = Annotated[int, typer.Option(help="Tokens of a block of the KV cache.")]
