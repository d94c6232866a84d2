"""`LabelTree`: the labels that a row chooses from, as a tree in which labels that begin alike share their tokens."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import Ints

Label = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens in a row, behind which the tree ends or parts. The first segment has none: it stands for the prompt.

    Each of its rows of logits predicts some of the tree's targets; the row of a segment without tokens is that of the
    prompt's last token.
    """

    tokens: tuple[int, ...]
    start: int  # number of the label's tokens before it
    targets: tuple[Ints, ...]  # for each row of logits, the targets that it predicts
    next: tuple["Segment", ...]

    @property
    def end(self) -> int:
        """Number of the label's tokens up to its end."""
        return self.start + len(self.tokens)

    @cached_property
    def places(self) -> int:
        """Number of sequences that compute what follows, this one included: one for each end of the tree."""
        return sum(segment.places for segment in self.next) or 1

    @cached_property
    def longest(self) -> int:
        """Number of tokens up to the end of the path that goes on with the first segment at each parting."""
        return self.next[0].longest if self.next else self.end

    def fork_blocks(self, prompt: int, size: int) -> int:
        """Return the blocks of `size` tokens that the forks behind it take of their own, behind a prompt of `prompt`
        tokens."""
        at = prompt + self.end
        own = sum(-(-(prompt + fork.longest) // size) - at // size for fork in self.next[1:])
        return own + sum(segment.fork_blocks(prompt, size) for segment in self.next)


@dataclass(frozen=True, eq=False)
class LabelTree:
    """The tree of a row's labels. A target is a token whose log-probability is wanted behind those before it.

    The targets are the tree's tokens, those before others first, and then all end-of-text tokens behind each label.
    """

    labels: tuple[Label, ...]
    root: Segment
    targets: Ints  # [m] token ids
    parent: Ints  # [tokens of the tree] the target before each; -1: the prompt
    last: Ints  # [labels] the target that is a label's last token

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(labels: tuple[Label, ...], ends: tuple[int, ...]) -> "LabelTree":
        """Make the tree of labels of one token or more, each of which may be followed by any of the tokens `ends`."""
        numbers: dict[Label, int] = {}
        for label in labels:
            for size in range(1, len(label) + 1):
                numbers.setdefault(label[:size], len(numbers))
        paths = sorted(numbers, key=len)  # a tie keeps the order of the labels
        numbers = {path: i for i, path in enumerate(paths)}
        following: dict[Label, list[Label]] = {path: [] for path in ((), *paths)}
        for path in paths:
            following[path[:-1]].append(path)
        behind: dict[Label, list[int]] = {path: [] for path in following}
        for i, label in enumerate(labels):
            behind[label] += range(len(paths) + i * len(ends), len(paths) + (i + 1) * len(ends))

        def segment(path: Label, start: int) -> Segment:
            rows = [path]
            while len(following[path]) == 1 and path:
                path = following[path][0]
                rows.append(path)
            predicted = tuple(np.array([*(numbers[p] for p in following[row]), *behind[row]], np.int64) for row in rows)
            return Segment(path[start:], start, predicted, tuple(segment(p, len(path)) for p in following[path]))

        tokens = [path[-1] for path in paths] + [end for _ in labels for end in ends]
        return LabelTree(
            labels,
            segment((), 0),
            np.array(tokens, np.int64),
            np.array([numbers.get(path[:-1], -1) for path in paths], np.int64),
            np.array([numbers[label] for label in labels], np.int64),
        )

    def scores(self, found: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the log-probability of each label [labels], from those of the targets [m].

        A label's is the sum over its tokens, and the logarithm of the probability that any end follows.
        """
        count = len(self.parent)
        total = np.zeros(count + 1)  # the last one stands for the prompt
        for i, before in enumerate(self.parent.tolist()):
            total[i] = total[before] + found[i]
        ends = found[count:].reshape(len(self.labels), -1).astype(np.float64)
        scores: NDArray[np.float32] = (total[self.last] + np.logaddexp.reduce(ends, axis=1)).astype(np.float32)
        return scores
