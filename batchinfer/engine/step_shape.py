"""`StepShape`: all that two decoding steps must have in common for one recording to serve both.

Sizes are rounded up, so that there are few shapes: the numbers of tokens to a few sizes, and what attention's plan has
to as much as a step with that many tokens usually needs at most. How long contexts are, and how their keys are split,
then does not show in the shape.
"""

from dataclasses import dataclass

from batchinfer.kernels.attention_plan import AttentionPlan, Tile
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.models.batch import Batch

LEAST_COLUMNS = 64
"""The fewest columns of a block table: unused ones only take 4 bytes each on their way to the device."""
LEAST_WIDE_ITEMS = 32
"""The fewest items of the launch for many tokens: of shared prefixes, and of sequences with many drafts."""


@dataclass(frozen=True)
class PlanShape:
    """The sizes of a padded attention plan."""

    attention: AttentionShape
    launches: tuple[tuple[Tile, int], ...]  # each tile with its number of items
    merged: int
    partials: int

    @classmethod
    def of(cls, attention: AttentionShape, plan: AttentionPlan, tokens: int) -> "PlanShape":
        """Return the shape of `plan`, that of layers with this attention, padded to `tokens` tokens.

        A plan for one token of each sequence always has the same shape; sequences with drafts, and shared prefixes,
        may need a few more.
        """
        drafts = plan.tokens > len(plan.table)
        idle = tokens - plan.tokens  # each padding token has an item too, in the first launch
        needed = [len(items) + (0 if i else idle) for i, (_, items) in enumerate(plan.launches)]
        units = [max(LEAST_WIDE_ITEMS, tokens // 8) if i else tokens + plan.spare for i in range(len(needed))]
        launches = [(tile, doubled(unit, n)) for (tile, _), unit, n in zip(plan.launches, units, needed, strict=True)]
        # An item that is not split has no partial; an item added by splitting makes two of them at most, for each of
        # its tokens.
        merged = min(tokens, plan.spare) if len(plan.merged) <= plan.spare and not drafts else tokens
        unit = tokens + 4 * plan.spare if drafts else 2 * plan.spare or tokens
        partials = doubled(unit, plan.partials) if merged else 0
        return cls(attention, tuple(launches), merged, partials)


@dataclass(frozen=True)
class StepShape:
    """The sizes of a padded decoding step."""

    tokens: int
    columns: int  # of the block table
    sampling: bool  # whether any row is sampled, not greedy
    plans: tuple[PlanShape, ...]

    @classmethod
    def of(cls, batch: Batch, tokens: int) -> "StepShape":
        """Return the shape of a step without prompt tokens, padded to `tokens` tokens."""
        plans = plans_of(batch)
        columns = doubled(LEAST_COLUMNS, plans[0].table.shape[1])
        shapes = [PlanShape.of(attention, plan, tokens) for attention, plan in zip(batch.attention, plans, strict=True)]
        return cls(tokens, columns, batch.sampling is not None, tuple(shapes))


def plans_of(batch: Batch) -> list[AttentionPlan]:
    """Return the batch's attention plans, one for each shape of attention that a layer has."""
    plans = [plan for plan in batch.attention.values() if isinstance(plan, AttentionPlan)]
    assert len(plans) == len(batch.attention), "only a GPU's steps are recorded"
    return plans


def padded_count(count: int) -> int:
    """Round `count` up to 1, 2, 4, 8, or beyond that to one of four sizes per power of two."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    grain = 1 << (count - 1).bit_length() - 3
    return -(-count // grain) * grain


def largest_count(most: int) -> int:
    """Return the largest `padded_count` that is at most `most`; 0 if there is none."""
    return max((padded_count(n) for n in range(1, most + 1) if padded_count(n) <= most), default=0)


def doubled(unit: int, least: int) -> int:
    """Return `unit`, doubled until it is at least `least`."""
    return unit << max(0, -(-least // unit) - 1).bit_length()
