"""Find the draft model's folder and check that it suits the model that it drafts for. Free of torch."""

from dataclasses import replace

from batchinfer.engine.config import Speculation
from batchinfer.errors import Refused
from batchinfer.models.config import read_shape
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer


def resolve_draft_model(speculation: Speculation, model: str, tokenizer: Tokenizer, max_model_len: int) -> Speculation:
    """Return the setting with the draft model's name replaced by its folder; unchanged if it names no draft model.

    `tokenizer` is that of `model`, which the draft model drafts for. Raises `Refused` if the draft model keeps states,
    or has other tokens, a vocab_size below its tokenizer's, or fewer positions than `max_model_len`.
    """
    if speculation.model is None:
        return speculation
    name = f"draft model {speculation.model}"
    folder = resolve_model(str(speculation.model), None)
    shape = read_shape(folder)
    if shape.recurrent:
        raise Refused(
            f"{name} has layers that keep a state, from which rejected drafts are not taken back yet; take one whose "
            "layers are all of attention, or leave it out"
        )
    try:
        drafts = Tokenizer.load(folder, chats=False)
    except ValueError as error:
        raise Refused(f"{name}: {error}") from error
    if drafts.vocabulary != tokenizer.vocabulary:
        raise Refused(
            f"{name} has another tokenizer than {model}; the two must have the same tokens with the same ids: take a "
            "smaller model of the same family, or leave it out"
        )
    size, length = shape.vocab_size, shape.max_positions
    if size < tokenizer.vocab_size:
        raise Refused(
            f"{name} has vocab_size {size}, but its tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    if length < max_model_len:
        raise Refused(
            f"{name} takes {length} tokens of prompt and answer, and the job up to {max_model_len}; give "
            f"--max-model-len {length}, or another draft model"
        )
    return replace(speculation, model=folder)
