"""`Engine`: turns requests into completions. It schedules steps, launches them and takes what they sampled."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from batchinfer.engine.admission import Admission
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.ceilings import measure_copies, measure_peak
from batchinfer.engine.check_settings import check_settings
from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.drafts.draft_model import DraftModel, load_draft_model
from batchinfer.engine.drafts.gate import Gate
from batchinfer.engine.endings import endings
from batchinfer.engine.measured_room import room_for_keys
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.output_lengths import OutputLengths
from batchinfer.engine.pool_size import Room, is_out_of_memory, pool_blocks, pool_states
from batchinfer.engine.request import NO_SCORES, Completions, FinishReason, Requests, RowError, Scores, TokenScores
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.step_shape import padded_count
from batchinfer.engine.structures import Structures
from batchinfer.engine.transfer import Sampled
from batchinfer.engine.warm_up import warm_up
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.kernels.grain import TILE, padded_size
from batchinfer.models.batch import Batch
from batchinfer.models.config import read_model_config
from batchinfer.text.tokenizer import Tokenizer

NO_TOKENS = np.empty(0, np.int32)
NOT_FINITE = RowError("not_finite", "the model computed values that are not finite for this row")
NOT_FINITE_OR_BANNED = RowError(
    NOT_FINITE.code, "the model computed values that are not finite for this row, or every token is banned from it"
)
UNRECORDED = (
    "steps with penalties, bans, grammars or log-probabilities were launched kernel by kernel on the GPU, not as "
    "recorded graphs"
)
WAITING = (
    "penalties, --no-repeat-ngram-size, --max-thinking-tokens, bad words of several tokens and grammars look at a "
    "row's tokens: on the GPU each such step waited for the one before it"
)


@dataclass(frozen=True)
class _Step:
    """A launched step whose result was not taken yet; `started` is in seconds of `time.perf_counter`."""

    batch: Batch
    sampled: Sampled
    started: float


class Engine:
    """One model on one device. `add()` requests, then `step()` until nothing is `unfinished`.

    On a GPU the host schedules a step while the one before it still runs, and learns only later what that one sampled.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """Load the model. Raises `ValueError` naming a setting, field or tensor that does not fit."""
        started = time.perf_counter()
        model = read_model_config(config.model)
        check_settings(config, model, tokenizer)
        self.tokenizer = tokenizer
        try:
            self.runner = ModelRunner(config, model)
            draft_runner = load_draft_model(config)
            self._runners = [runner for runner in (draft_runner, self.runner) if runner is not None]
            room = room_for_keys(self.runner, self._runners, config).limited(config.kv_cache_memory_bytes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"memory does not hold the weights and a step of {config.max_num_batched_tokens} tokens ({error}); "
                "take weights in fewer bits (--quantization), lower --max-num-batched-tokens or --max-num-seqs, or end "
                f"what else runs on {config.device}"
            ) from error
        self._stats = EngineStats(device=self.runner.device_name, notes=self.runner.notes)
        # Counted once, because they are sums over all matrices.
        self._operations_per_token = self.runner.decoder.operations_per_token
        self._operations_per_logits = self.runner.decoder.head.operations_per_row
        room, states = self._states(config, room)
        a_token = sum(runner.bytes_per_token for runner in self._runners)
        blocks, note = pool_blocks(config, a_token, self.runner.kv_dtype, room)
        self._stats.notes += [note] if note else []
        for runner in self._runners:
            runner.allocate(blocks, config.block_size, states)
        if config.device != "cpu":
            self._warm_up(config)
        lengths = OutputLengths(config.max_model_len) if config.learned_admission else None
        self.table, self.scheduler = self._scheduler(config, blocks, states, lengths)
        self.structures = Structures(self.table, tokenizer, model.vocab_size, config.forced_tokens)
        self.scheduler.structures = self.structures
        self.drafter = self._gate(config, draft_runner, blocks)
        self.steps: deque[_Step] = deque()  # launched and not ended, the oldest first
        self._settled = 0.0  # time at which the last step ended
        self._stats.load_seconds = time.perf_counter() - started

    def add(self, requests: Requests) -> None:
        """Queue requests. Raises `ValueError` naming a row whose prompt and new tokens do not fit the context."""
        lengths, most = np.diff(requests.offsets), requests.most_new_tokens
        for i in np.flatnonzero((lengths < 1) | (lengths + most > self.table.max_tokens))[:1]:
            raise ValueError(
                f"row {requests.rows[i]} has {lengths[i]} prompt tokens and max_tokens {most[i]}; there must be a "
                f"prompt, and both together must be at most max_model_len {self.table.max_tokens}"
            )
        self.scheduler.labels.refuse_unfit(requests)
        self.structures.prepare(requests)
        self.scheduler.add(requests)

    def _note_slower_steps(self) -> None:
        """Note for the report that some running rows make steps slower on a GPU."""
        table = self.table
        unrecorded = table.changes_logits | table.structured | (table.logprobs >= 0)
        slower = {UNRECORDED: unrecorded, WAITING: table.reads_tokens}
        for note, those in slower.items():
            if (table.active & those).any() and note not in self._stats.notes:
                self._stats.notes.append(note)

    @property
    def unfinished(self) -> int:
        """Number of rows that wait or run."""
        return self.scheduler.unfinished

    def take_admitted(self) -> list[int]:
        """Return the rows that began since the last call."""
        admission = self.scheduler.admission
        admitted, admission.admitted = admission.admitted, []
        return admitted

    def step(self) -> Completions:
        """Begin a step, and end the oldest if too many are under way. Return the rows that ended, often none."""
        if self.steps and self._needs_tokens:
            return self._end(self.steps.popleft())
        begun = self._begin()
        if not self.steps or (begun and len(self.steps) <= self.runner.late and not self.steps[-1].batch.drafted):
            return Completions.none()
        return self._end(self.steps.popleft())

    @property
    def _needs_tokens(self) -> bool:
        """True if the next step can be made only once it is known what the steps before it have sampled."""
        table = self.table
        return bool((table.active & table.reads_tokens).any()) or (self.drafter is not None and self.drafter.wanted)

    def _begin(self) -> bool:
        """Launch the next step, a smaller one if memory does not hold it; return False if there is none."""
        drafter = None if self.steps else self.drafter
        while (batch := self.scheduler.schedule(drafter)) is not None:
            if self.runner.late:
                self._note_slower_steps()
            self._wipe()
            started = time.perf_counter()
            try:
                self.steps.append(_Step(batch, self.runner.launch(batch), started))
                return True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.scheduler.withdraw(batch)
                self._shrink(batch, error)
        return False

    def _wipe(self) -> None:
        """Wipe free blocks that hold values that are not finite, before other sequences get them.

        Attention gives hidden keys a weight of zero, but zero times infinity is not zero.
        """
        admission = self.scheduler.admission
        for blocks in admission.wiped:
            self.runner.clear_blocks(blocks)
        admission.wiped = []

    def _shrink(self, batch: Batch, error: Exception) -> None:
        on_gpu = self.runner.backend.device.type == "cuda"
        # On a GPU, the KV cache takes all memory that nothing else needs.
        remedies = ("--gpu-memory-utilization, " if on_gpu else "") + "--max-num-seqs or --max-num-batched-tokens"
        tokens = batch.prompt_tokens + batch.query_tokens
        budget = tokens // 2 // TILE * TILE
        if not budget:
            raise MemoryError(f"memory does not hold a step of {tokens} tokens ({error}); lower {remedies}") from error
        self.scheduler.budget = budget
        self._stats.notes.append(
            f"a step of {tokens} tokens did not fit into memory: steps have at most {budget} from then on; lower "
            f"{remedies} to avoid it"
        )
        torch.cuda.empty_cache()

    def _end(self, step: _Step) -> Completions:
        """Wait for a step, append what it sampled, and return the rows that ended."""
        batch = step.batch
        new_tokens, scores = self.scheduler.update(batch, *step.sampled.wait()), step.sampled.scores
        whole = {} if batch.scoring is None else self.scheduler.scores.update(batch.scoring, new_tokens, scores)
        if new_tokens.spoiled is not None:
            self.runner.clear_slots(new_tokens.spoiled)
        extended = self.structures.extend(new_tokens)
        done = endings(self.table, extended, self.scheduler.eos_ids, self.tokenizer)
        done |= dict.fromkeys(self.structures.failed(extended.places), FinishReason.ERROR)
        done |= whole
        if batch.labels is not None and scores.labels is not None:
            done |= self.scheduler.labels.update(batch.labels, scores.labels.numpy())
        completions = self._completions(done) if done else Completions.none()
        for place, reason in done.items():
            self.scheduler.finish(place, reason is FinishReason.ERROR)
        self._stats.accepted += new_tokens.accepted
        now = time.perf_counter()
        seconds = now - max(step.started, self._settled)
        if self.drafter is not None:
            self.drafter.settle(batch, new_tokens, seconds)
            self.drafter.remember(completions)
        self._count(batch, seconds)
        self._settled = now
        return completions

    def drop(self) -> None:
        """Forget all rows, waiting and running. Works after an error or an interruption too."""
        for step in self.steps:
            step.sampled.wait()
        self.steps.clear()
        self.scheduler.drop()

    def generate(self, requests: Requests) -> Iterator[Completions]:
        """Run requests to the end; yield completions as rows end."""
        self.add(requests)
        while self.unfinished:
            completions = self.step()
            if len(completions):
                yield completions

    def stats(self) -> EngineStats:
        """Return the counts so far. The device's peak speeds are measured once no row is left, to delay none."""
        stats = self._stats
        if self.unfinished or not stats.peak_operations_per_second:  # not the memory that measuring takes
            stats.peak_memory_bytes = peak_memory_bytes()
        if stats.steps and not self.unfinished and not stats.peak_operations_per_second:
            try:
                peak = measure_peak(self.runner.scheme, self.runner.dtype, self.runner.backend)
                stats.peak_operations_per_second = peak
                stats.peak_bytes_per_second = measure_copies(self.runner.backend.device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):  # without memory to measure it, the report leaves it out
                    raise
        admission = self.scheduler.admission
        stats.preemptions, stats.shared_tokens = admission.preemptions, admission.shared_tokens
        stats.running, stats.kv_cache_used = self.scheduler.running, self.scheduler.manager.used
        if self.runner.late:
            steps = self.runner.steps
            stats.replayed_steps, stats.recorded_steps = steps.replays, steps.recorded
            stats.launched_steps = steps.launched
        stats.expert_layers, stats.experts_touched = self.runner.experts_touched
        stats.forced = self.structures.forced
        stats.weight_bytes = self.runner.decoder.weight_bytes
        stats.kv_cache_bytes = self.runner.kv_cache_bytes
        stats.peak_device_bytes = self.runner.peak_device_bytes
        stats.kernels = {op: path for runner in self._runners for op, path in runner.backend.kernels.items()}
        return stats

    def _warm_up(self, config: EngineConfig) -> None:
        for runner in self._runners:
            warm_up(runner, config, runner.row_steps)

    def _states(self, config: EngineConfig, room: Room) -> tuple[Room, int]:
        """Return the room that is left beside the model's states, and their number; 0 if it has none."""
        a_state = self.runner.bytes_per_state
        if not a_state:
            return room, 0
        states, note = pool_states(config, a_state, room)
        self._stats.notes += [note] if note else []
        return room.without(states * a_state, "states"), states

    def _scheduler(
        self, config: EngineConfig, blocks: int, states: int, lengths: OutputLengths | None
    ) -> tuple[SequenceTable, Scheduler]:
        table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size, config.prefix_grain)
        manager = BlockManager(blocks)
        kept = BlockManager(states) if states else None
        ends = tuple(self.tokenizer.eos_ids)
        admission = Admission(table, manager, config.prefix_sharing, lengths, kept, ends)
        grains = self.runner.decoder.row_grain, self.runner.logits_grain
        inputs = self.runner.attention_inputs
        budget, eos_ids = config.max_num_batched_tokens, np.array(self.tokenizer.eos_ids, np.int64)
        return table, Scheduler(table, manager, admission, inputs, budget, *grains, eos_ids, kept)

    def _gate(self, config: EngineConfig, runner: ModelRunner | None, blocks: int) -> Gate | None:
        if config.speculation.method == "off":
            return None
        grain = self.runner.decoder.row_grain
        padded = padded_count if self.runner.late else partial(padded_size, row_grain=grain)
        model = None if runner is None else DraftModel(runner, config, self.table, blocks, self.runner)
        return Gate(self.table, config.speculation, padded, model, self.runner.late > 0, self._stats.notes)

    def _completions(self, done: dict[int, FinishReason]) -> Completions:
        table, scores, labels, places = self.table, self.scheduler.scores, self.scheduler.labels, list(done)
        failed = [p for p in places if done[p] is FinishReason.ERROR]
        found = [(NO_TOKENS, NO_SCORES) if done[p] is FinishReason.ERROR else self._found(p) for p in places]
        new = [tokens for tokens, _ in found]
        self._stats.completion_tokens += sum(map(len, new))

        def scored(wanted: bool, of: Callable[[int], TokenScores]) -> TokenScores | None:
            if not wanted:
                return None
            return TokenScores.of([TokenScores.none() if p in failed else of(p) for p in places])

        return Completions(
            rows=table.row[places],
            token_ids=np.concatenate(new),
            offsets=np.cumsum([0, *map(len, new)]),
            finish_reasons=np.array([done[p] for p in places], np.int8),
            errors={int(table.row[p]): self._error(p) for p in failed},
            scores=Scores.of([scores for _, scores in found]) if any(map(labels.__contains__, places)) else None,
            logprobs=scored(bool((table.logprobs[places] >= 0).any()), scores.of),
            prompt_logprobs=scored(any(table.params[p].prompt_logprobs >= 0 for p in places), scores.of_prompt),
        )

    def _error(self, place: int) -> RowError:
        banned = NOT_FINITE_OR_BANNED if self.table.changes_logits[place] else NOT_FINITE
        return self.structures.error(place) or banned

    def _found(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the new tokens of a row, or those that were scored, and the scores of its labels if it has any."""
        if place in self.scheduler.labels:
            return self.scheduler.labels.result(place)
        tokens = self.table.generated(place)
        if self.table.ends_with_prompt[place]:
            tokens = self.table.tokens[place, self.table.scored_from[place] : self.table.length[place]]
        return tokens, NO_SCORES

    def _count(self, batch: Batch, seconds: float) -> None:
        stats = self._stats
        tokens = batch.prompt_tokens + batch.query_tokens
        share = batch.prompt_tokens / tokens
        stats.steps += 1
        stats.prompt_tokens += batch.prompt_tokens
        stats.prefill_seconds += seconds * share
        stats.decode_seconds += seconds * (1 - share)
        stats.drafted += batch.drafted
        stats.padded_tokens += len(batch.tokens) - tokens
        stats.step_sizes[len(batch.tokens)] = stats.step_sizes.get(len(batch.tokens), 0) + 1
        read, unshared = self.runner.kv_bytes_read(batch)
        stats.kv_bytes_read += read
        stats.kv_bytes_unshared += unshared
        stats.operations += tokens * self._operations_per_token + batch.logits_rows * self._operations_per_logits
