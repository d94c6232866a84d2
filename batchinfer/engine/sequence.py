"""`SequenceTable`: the running sequences, as arrays. A place is a sequence's row in this table."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.prefix_tree import SharedTile
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import MAX_INT32, SamplingParams
from batchinfer.kernels.grain import TILE


class SequenceTable:
    """Holds up to `capacity` sequences of up to `max_tokens` tokens each, in blocks of `block_size` tokens.

    Each array has one entry per place.
    """

    def __init__(self, capacity: int, max_tokens: int, block_size: int, grain: int = TILE) -> None:
        """Take the number of tokens that sequences share at a time, a multiple of the block's size."""
        self.block_size, self.grain = block_size, grain
        self.max_tokens = max_tokens
        self.active = np.zeros(capacity, np.bool_)
        self.row = np.zeros(capacity, np.int64)
        self.tokens = np.zeros((capacity, max_tokens), np.int32)  # prompt, then generated tokens
        self.prompt_length = np.zeros(capacity, np.int64)
        self.prefill_end = np.zeros(capacity, np.int64)  # tokens before this are prefilled in tiles, later ones decoded
        self.length = np.zeros(capacity, np.int64)  # number of known tokens
        self.computed = np.zeros(capacity, np.int64)  # number of tokens whose keys and values are in the cache
        self.end = np.zeros(capacity, np.int64)  # greatest length, at which the sequence ends
        # Room for whole tiles, because a prompt's last tile reads past the prompt's end; 0 where no block is taken.
        self.blocks = np.zeros((capacity, -(-max_tokens // TILE) * (TILE // block_size)), np.int64)
        self.block_count = np.zeros(capacity, np.int64)
        self.own_from = np.zeros(capacity, np.int64)  # number of blocks of shared tiles, which come first
        self.promised = np.zeros(capacity, np.int64)  # number of blocks of its own that are promised
        self.epoch = np.zeros(capacity, np.int64)  # number of the sequence, counted in order of admission
        # Place of the twin (a sequence with the same prompt) that computes the end of the prompt for both; -1 if none.
        self.twin_of = np.full(capacity, -1, np.int64)
        self.template = np.full(capacity, -1, np.int64)  # a number shared by rows whose prompts begin alike; -1 if none
        self.begins = np.zeros(capacity, np.int64)  # position at which the sequence itself begins to compute
        self.state = np.zeros(capacity, np.int64)  # number of its state, if the model has states
        self.origin: list[SharedTile | None] = [None] * capacity  # the tile whose snapshot it begins from, until done
        self.tiles: list[list[SharedTile]] = [[] for _ in range(capacity)]
        self.request: list[tuple[Requests, int] | None] = [None] * capacity
        self.seed = np.zeros(capacity, np.int64)
        self.temperature = np.zeros(capacity, np.float32)
        self.top_k = np.zeros(capacity, np.int64)
        self.top_p = np.ones(capacity, np.float32)
        self.min_p = np.zeros(capacity, np.float32)
        self.repetition_penalty = np.ones(capacity, np.float32)
        self.presence_penalty = np.zeros(capacity, np.float32)
        self.frequency_penalty = np.zeros(capacity, np.float32)
        self.thinking_end = np.full(capacity, -1, np.int64)  # new tokens after which thinking is closed; -1 if never
        self.ignore_eos = np.zeros(capacity, np.bool_)
        self.undrafted = np.zeros(capacity, np.bool_)  # True: gets no drafts, as earlier ones were not finite
        self.params = [SamplingParams()] * capacity
        self.stops = np.zeros(capacity, np.bool_)  # True: has stop strings or stop tokens
        self.changes_logits = np.zeros(capacity, np.bool_)
        self.bans = np.zeros(capacity, np.bool_)  # True: changes them by bans, maybe among other things
        self.reads_tokens = np.zeros(capacity, np.bool_)  # True: the changes of its logits depend on its tokens
        self.structured = np.zeros(capacity, np.bool_)  # True: its answer follows a grammar
        self.scored = np.zeros(capacity, np.bool_)  # True: its tokens are known, and get log-probabilities
        self.ends_with_prompt = np.zeros(capacity, np.bool_)  # True: it is scored, and all its tokens are its prompt
        self.logprobs = np.full(capacity, -1, np.int64)
        self.scored_from = np.full(capacity, MAX_INT32, np.int64)  # its own first prompt token that is scored, and
        self.finds_from = np.full(capacity, MAX_INT32, np.int64)  # the first of those that it finds, for others too
        self.likeliest = np.zeros(capacity, np.int64)  # number of likeliest tokens found beside those of its prompt

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def add(self, place: int, requests: Requests, i: int, generated: NDArray[np.int32]) -> None:
        """Put request `i` into a free place; `generated` are its new tokens from before it was preempted."""
        prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
        params: SamplingParams = requests.params[requests.param_index[i]]
        self.active[place] = True
        self.request[place] = (requests, i)
        self.row[place] = requests.rows[i]
        self.prompt_length[place] = self.prefill_end[place] = len(prompt)
        self.length[place] = len(prompt) + len(generated)
        self.tokens[place, : len(prompt)] = prompt
        self.tokens[place, len(prompt) : len(prompt) + len(generated)] = generated
        self.computed[place] = self.begins[place] = 0
        self.twin_of[place] = -1
        self.undrafted[place] = False
        self.end[place] = len(prompt) + params.max_tokens
        self.seed[place] = requests.seeds[i].astype(np.int64)
        self.temperature[place] = params.temperature
        self.top_k[place] = params.top_k
        self.top_p[place] = params.top_p
        self.min_p[place] = params.min_p
        self.repetition_penalty[place] = params.repetition_penalty
        self.presence_penalty[place] = params.presence_penalty
        self.frequency_penalty[place] = params.frequency_penalty
        self.thinking_end[place] = params.max_thinking_tokens or -1
        self.ignore_eos[place] = params.ignore_eos
        self.params[place] = params
        self.stops[place] = bool(params.stop or params.stop_token_ids)
        self.changes_logits[place], self.bans[place] = params.changes_logits, params.bans
        self.reads_tokens[place] = params.reads_tokens
        self.structured[place] = params.structure is not None
        self.scored[place] = self.ends_with_prompt[place] = requests.scored_from is not None
        self.logprobs[place] = params.logprobs
        if requests.scored_from is not None:
            self.end[place] = len(prompt) + 1  # nothing is decoded
            self.logprobs[place] = max(params.logprobs, 0)
        first, likeliest = requests.prompt_scores(i)
        self.scored_from[place] = self.finds_from[place] = first
        self.likeliest[place] = likeliest

    def fork(self, place: int, source: int, start: int) -> None:
        """Put into a free place a scored sequence that has the tokens before `start` of the one at `source`.

        It reads those of its blocks that are full, and owns none yet.
        """
        full = start // self.block_size
        self.active[place] = self.scored[place] = self.undrafted[place] = True
        self.row[place], self.epoch[place] = self.row[source], self.epoch[source]
        self.prompt_length[place] = self.prompt_length[source]
        self.prefill_end[place] = self.computed[place] = self.begins[place] = start
        self.twin_of[place] = self.template[place] = -1
        self.stops[place] = self.changes_logits[place] = self.bans[place] = self.reads_tokens[place] = False
        self.structured[place] = self.ends_with_prompt[place] = False
        self.logprobs[place] = -1
        self.blocks[place, :full] = self.blocks[source, :full]
        self.block_count[place] = self.own_from[place] = full

    def share(self, place: int, tiles: list[SharedTile]) -> None:
        """Let the sequence at `place` begin with these shared tiles."""
        blocks = np.concatenate([tile.blocks for tile in tiles]) if tiles else np.empty(0, np.int64)
        self.tiles[place] = tiles
        self.blocks[place, : len(blocks)] = blocks
        self.block_count[place] = self.own_from[place] = len(blocks)

    def remove(self, place: int) -> NDArray[np.int64]:
        """Free a place; return the blocks that only its sequence used."""
        self.active[place] = False
        self.request[place] = None
        own: NDArray[np.int64] = self.blocks[place, self.own_from[place] : self.block_count[place]].copy()
        self.tiles[place] = []
        self.blocks[place] = 0
        self.block_count[place] = self.own_from[place] = 0
        return own

    def slots(self, places: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the KV cache slots of the tokens at `positions` [n] of the sequences at `places` [n]."""
        block = self.blocks[places, positions // self.block_size]
        return block * self.block_size + positions % self.block_size

    def generated(self, place: int) -> NDArray[np.int32]:
        """Return the tokens that were generated so far."""
        new: NDArray[np.int32] = self.tokens[place, self.prompt_length[place] : self.length[place]]
        return new
