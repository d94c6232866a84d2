"""`LabelEncoder`: the token ids that a label has behind a prompt.

These are what prompt and label have together, without those of the prompt. How a label is cut into tokens may depend
on the last word of the prompt, but not on what stands further ahead: so labels are encoded behind the end of the prompt
alone, and behind each such end once. If the last tokens of the prompt are not among those of both together, because a
token would span the border, the label is encoded by itself.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchinfer.text.tokenizer import Tokenizer

TAIL = 16  # most tokens of a prompt that a label's tokens are taken to depend on
CHARACTER = 4  # most tokens that a character has, those of bytes: as many bytes as UTF-8 takes
MOST_KEPT = 100_000  # results that are remembered

Label = tuple[int, ...]


class LabelEncoder:
    """Encodes labels behind prompts; control tokens in a label are plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = np.zeros(tokenizer.vocab_size, np.bool_)
        self._added[list(tokenizer.added_tokens.values())] = True
        self._kept: dict[tuple[Label, tuple[str, ...]], tuple[Label, ...]] = {}
        self._before = "\n", tuple(tokenizer.encode_plain(["\n"])[0])

    def encode(self, prompt: NDArray[np.int32], labels: Sequence[str]) -> tuple[Label, ...]:
        """Return the token ids of each label behind `prompt`; a label may have none."""
        tail = self._tail(prompt)
        key = tail, tuple(labels)
        if (found := self._kept.get(key)) is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = self._kept[key] = self._behind(tail, labels)
        return found

    def behind(self, prompt: NDArray[np.int32], texts: Sequence[str]) -> tuple[Label, ...]:
        """Return the same for texts that hardly come twice, and remember none."""
        return self._behind(self._tail(prompt), texts)

    def _tail(self, prompt: NDArray[np.int32]) -> Label:
        """Return the end of the prompt behind its last added token: no token spans one."""
        end = prompt[-TAIL:]
        added = np.flatnonzero(self._added[np.minimum(end, len(self._added) - 1)])
        return tuple(end[added[-1] + 1 :].tolist() if len(added) else end.tolist())

    def _behind(self, tail: Label, labels: Sequence[str]) -> tuple[Label, ...]:
        # A prompt that is cut within a character begins at the next one.
        for end in (tail[first:] for first in range(min(CHARACTER, len(tail) + 1))):
            text = self._tokenizer.text_of(end)
            # SentencePiece puts a space before a text, and takes one off when it decodes. A line break keeps both away.
            for start, ids in (("", ()), self._before):
                known, *whole = (
                    tuple(row) for row in self._tokenizer.encode_plain([start + text + x for x in ("", *labels)])
                )
                if known == (*ids, *end) and all(row[: len(known)] == known and len(row) > len(known) for row in whole):
                    return tuple(row[len(known) :] for row in whole)
        return tuple(self._alone(label) for label in labels)

    def _alone(self, label: str) -> Label:
        start, ids = self._before
        row = tuple(self._tokenizer.encode_plain([start + label])[0])
        return row[len(ids) :] if row[: len(ids)] == ids else tuple(self._tokenizer.encode_plain([label])[0])
