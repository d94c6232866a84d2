"""What a step's sequences change in the model's logits: from their sampling params and the tokens that they have.

The meanings are those of transformers' processors, and the order of their effects too: the repetition penalty, then
what the presence and frequency penalties subtract, then bans. Last comes the tag that closes a model's thinking.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.logits import LogitsChanges
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.models.batch import as_tensor

Known = NDArray[np.int32]  # a sequence's tokens before the one to be chosen: its prompt, then its answer so far
Floats = NDArray[np.float32]
NO_IDS = np.empty(0, np.int64)
ROW, TOKEN = 33, (1 << 32) - 1  # where in a number a row begins, and the bits of a token id


def logits_changes(table: SequenceTable, places: Ints, positions: Ints, eos_ids: Ints) -> LogitsChanges | None:
    """Return the changes of r rows of logits; None if there are none.

    Row i is followed by the token at `positions[i]` of the sequence at `places[i]`, whose earlier tokens must be in
    the table. Drafts count as if they were accepted: where they are not, nothing is chosen from the row.
    """
    if not table.changes_logits[places].any():
        return None
    rows, ids, factors, subtracted = _penalties(table, places, positions)
    banning = np.flatnonzero(table.bans[places])
    closing = _closing(table, places, positions)
    banned = [_banned(table, int(places[i]), int(positions[i]), eos_ids) for i in banning.tolist()]
    return LogitsChanges(
        rows=as_tensor(rows),
        ids=as_tensor(ids),
        factors=as_tensor(factors),
        subtracted=as_tensor(subtracted),
        banned_rows=as_tensor(np.repeat(banning, np.array([len(ids) for ids in banned], np.int64))),
        banned_ids=as_tensor(np.concatenate([NO_IDS, *banned])),
        forced_rows=as_tensor(np.array(list(closing), np.int64)),
        forced_ids=as_tensor(np.array(list(closing.values()), np.int64)),
    )


def _closing(table: SequenceTable, places: Ints, positions: Ints) -> dict[int, int]:
    """Return the rows whose answer has as many tokens as it may think, and still thinks: the id of the closing tag by
    row."""
    due = positions - table.prompt_length[places] == table.thinking_end[places]
    found = {}
    for i in np.flatnonzero(due).tolist():
        place = int(places[i])
        opening, closing = table.params[place].thinking_tags
        tags = table.tokens[place, : positions[i]]
        tags = tags[(tags == opening) | (tags == closing)]
        if len(tags) and tags[-1] == opening:
            found[i] = closing
    return found


def _penalties(table: SequenceTable, places: Ints, positions: Ints) -> tuple[Ints, Ints, Floats, Floats]:
    """Return what is penalized: (rows, token ids, each of a row once, factors, what is subtracted)."""
    repetition, presence, frequency = (
        column[places] for column in (table.repetition_penalty, table.presence_penalty, table.frequency_penalty)
    )
    repeated = repetition != 1
    penalized = repeated | (presence != 0) | (frequency != 0)
    prompts = table.prompt_length[places]
    starts = np.where(repeated, 0, prompts)
    at, offsets = ranges(starts, np.where(penalized, positions - starts, 0))
    row = np.repeat(np.arange(len(places)), np.diff(offsets))
    answered = at >= prompts[row]
    # One number for each occurrence: the row, the token, and whether the answer has it. Sorted, equal tokens of a row
    # are neighbours.
    tokens = table.tokens.reshape(-1)[at + (places * table.max_tokens)[row]]
    keys = np.sort((row << ROW) + (tokens.astype(np.int64) << 1) + answered)
    first = np.flatnonzero(np.diff(keys >> 1, prepend=-1))
    counts = np.add.reduceat(keys & 1, first) if len(first) else first
    rows, ids = keys[first] >> ROW, keys[first] >> 1 & TOKEN
    return rows, ids, repetition[rows], presence[rows] * (counts > 0) + frequency[rows] * counts.astype(np.float32)


def _banned(table: SequenceTable, place: int, position: int, eos_ids: Ints) -> Ints:
    """Return the ids of the tokens that must not be at this position."""
    params, known = table.params[place], table.tokens[place, :position]
    banned = [np.array(params.suppress_tokens, np.int64)]
    answered = position - int(table.prompt_length[place])
    if not answered:
        banned.append(np.array(params.begin_suppress_tokens, np.int64))
    if answered < params.min_tokens:
        banned.append(np.array(params.stop_token_ids, np.int64))
        if not params.ignore_eos:
            banned.append(eos_ids)
    if 0 < params.no_repeat_ngram_size <= len(known):
        banned.append(_completing(known, params.no_repeat_ngram_size))
    if params.bad_words_ids:
        # Leave out bad words that are one end-of-text id, as transformers does: an answer may always end.
        words = [word for word in params.bad_words_ids if len(word) > 1 or word[0] not in eos_ids]
        banned.append(np.array([word[-1] for word in words if _ends_with(known, word[:-1])], np.int64))
    return np.concatenate(banned)


def _completing(known: Known, n: int) -> Ints:
    """Return the tokens that followed the last n - 1 tokens where they came before."""
    windows = sliding_window_view(known, n)
    ids: Ints = windows[(windows[:, :-1] == known[len(known) - n + 1 :]).all(1), -1].astype(np.int64)
    return ids


def _ends_with(known: Known, tokens: tuple[int, ...]) -> bool:
    return len(tokens) <= len(known) and tuple(known[len(known) - len(tokens) :].tolist()) == tokens
