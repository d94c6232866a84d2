"""Find the sequences that end with the tokens that a step has sampled, and why they end."""

import numpy as np

from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.request import FinishReason
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints
from batchinfer.text.tokenizer import Tokenizer


def endings(
    table: SequenceTable, new_tokens: NewTokens, eos_ids: Ints, tokenizer: Tokenizer
) -> dict[int, FinishReason]:
    """Return the sequences, by place, that end with these tokens, and why they end.

    Tokens behind a stop string are dropped. Reasons are added in order of rank: the last one wins.
    """
    places = new_tokens.places
    stopped = _stopped(table, new_tokens, tokenizer)
    newest = table.tokens[places, table.length[places] - 1]
    ended = (newest[:, None] == eos_ids).any(1) & ~table.ignore_eos[places]
    done = {int(p): FinishReason.LENGTH for p in places[table.length[places] >= table.end[places]]}
    done |= dict.fromkeys(stopped, FinishReason.STOP)
    done |= {int(p): FinishReason.STOP for p in places[ended]}
    done |= {int(p): FinishReason.ERROR for p in places[~new_tokens.finite]}
    return done


def _stopped(table: SequenceTable, new_tokens: NewTokens, tokenizer: Tokenizer) -> list[int]:
    """Return the places in which a new token is a stop token or completes a stop string.

    That token becomes their last one.
    """
    if not table.stops[new_tokens.places].any():
        return []
    candidates = [
        (place, length)
        for place, count in zip(new_tokens.places.tolist(), new_tokens.counts.tolist(), strict=True)
        if table.stops[place]
        for length in range(int(table.length[place]) - count + 1, int(table.length[place]) + 1)
    ]
    # A token is one byte or more, so a stop string spans at most as many tokens as bytes; 8 more give context.
    longest = [max((len(stop.encode()) + 8 for stop in table.params[p].stop), default=0) for p, _ in candidates]
    tails = [
        table.tokens[p, max(int(table.prompt_length[p]), length - most) : length]
        for (p, length), most in zip(candidates, longest, strict=True)
    ]
    if not tails:
        return []
    texts = tokenizer.decode_batch(np.concatenate(tails), np.cumsum([0, *map(len, tails)]))
    stopped: dict[int, int] = {}
    for (place, length), text in zip(candidates, texts, strict=True):
        params, token = table.params[place], int(table.tokens[place, length - 1])
        if token in params.stop_token_ids or any(stop in text for stop in params.stop):
            stopped.setdefault(place, length)
    for place, length in stopped.items():
        table.length[place] = length
    return list(stopped)
