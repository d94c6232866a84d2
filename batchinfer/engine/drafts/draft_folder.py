"""The draft model's folder, and whether it suits the model that it drafts for. Free of torch."""

from dataclasses import replace

from batchinfer.engine.config import Speculation
from batchinfer.errors import Refused
from batchinfer.models.hub import read_config, resolve_model
from batchinfer.text.tokenizer import Tokenizer


def resolve_draft_model(speculation: Speculation, model: str, tokenizer: Tokenizer, max_model_len: int) -> Speculation:
    """The setting with its draft model's folder, if it names one, beside a `model` that has this tokenizer.

    Raises `Refused` where the draft model's tokens are others, or too few.
    """
    if speculation.model is None:
        return speculation
    name = f"draft model {speculation.model}"
    folder = resolve_model(str(speculation.model), None)
    try:
        drafts = Tokenizer.load(folder)
    except ValueError as error:
        raise Refused(f"{name}: {error}") from error
    if drafts.vocabulary != tokenizer.vocabulary:
        raise Refused(
            f"{name} has another tokenizer than {model}; the two must have the same tokens with the same ids: take a "
            "smaller model of the same family, or leave it out"
        )
    config = read_config(folder)
    size, length = config.get("vocab_size"), config.get("max_position_embeddings")
    if type(size) is int and size < tokenizer.vocab_size:  # what is no number the engine refuses
        raise Refused(
            f"{name} has vocab_size {size}, but its tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    if type(length) is int and length < max_model_len:
        raise Refused(
            f"{name} takes {length} tokens of prompt and answer, and the job up to {max_model_len}; give "
            f"--max-model-len {length}, or another draft model"
        )
    return replace(speculation, model=folder)
