"""`ScoreDemand`: which log-probabilities a row must find of its prompt, also for later rows that share its tiles.

A tile that rows share is computed once, by the first of them, its maker. So the maker finds the log-probabilities of
the tile's tokens if any of these rows wants them. The token behind the last tile that a row shares is the row's own,
but the tile's last position predicts it: the maker finds those of all such tokens, which are known beforehand.
"""

from dataclasses import dataclass

import numpy as np

from batchinfer.engine.prefix_tree import Likeness
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import MOST_LOGPROBS
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints


@dataclass(frozen=True)
class ScoreDemand:
    """What n rows, which come in this order, must find."""

    first: Ints  # [n] position of the first token of the prompt that gets a log-probability; its length if none does
    likeliest: int  # number of likeliest tokens, beside each
    continuations: dict[int, dict[int, tuple[int, ...]]]  # by maker, then by number of tiles: the tokens behind these


def score_demand(requests: Requests, alike: Likeness, grain: int = TILE) -> ScoreDemand | None:
    """Return what rows must find whose prompts are `alike`, in tiles of `grain` tokens; None if no token of a prompt
    gets a log-probability."""
    if not requests.scores_prompts:
        return None
    wanted = [requests.prompt_scores(i) for i in range(len(requests))]
    tiles = alike.tiles.tolist()
    shared = np.where(alike.twins, np.diff(requests.offsets), alike.tiles * grain).tolist()
    first = [position for position, _ in wanted]
    for i in range(len(first) - 1, 0, -1):
        if first[i] <= shared[i]:  # the row before shares these tiles too, or is the first to have them
            first[i - 1] = min(first[i - 1], first[i])
    behind: dict[int, dict[int, list[int]]] = {}
    path: list[int] = []  # as in `Likeness.branches`: a row's tiles are new in the last row that has fewer
    for row, depth in enumerate(tiles):
        while path and tiles[path[-1]] >= depth:
            path.pop()
        if depth and first[row] <= depth * grain:
            token = int(requests.token_ids[requests.offsets[row] + depth * grain])
            behind.setdefault(path[-1], {}).setdefault(depth, []).append(token)
        path.append(row)
    # Always as many: so which of equally likely tokens are the last ones depends on the row alone.
    likeliest = MOST_LOGPROBS if any(count for _, count in wanted) else 0
    found = {
        maker: {depth: tuple(dict.fromkeys(tokens)) for depth, tokens in each.items()} for maker, each in behind.items()
    }
    return ScoreDemand(np.array(first, np.int64), likeliest, found)
