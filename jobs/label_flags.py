"""The flags for rows that choose from labels."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from batchinfer.errors import UsageError
from batchinfer.flag import Flag, Kind

REMEDY = 'give labels with commas between them, or a JSON list as \'["yes", "no"]\''


def labels_of(flag: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Split texts at their commas into labels, without the spaces around them; a text that begins with [ is a JSON list
    of labels. Raises `UsageError` for anything else, and for a label that comes twice."""
    labels: list[str] = []
    for text in texts:
        if text.lstrip().startswith("["):
            try:
                listed = json.loads(text)
            except ValueError as error:
                raise UsageError(f"{flag} is {text[:50]!r}, which is no JSON list: {error}; {REMEDY}") from error
            if not all(isinstance(label, str) for label in listed):
                raise UsageError(f"{flag} is {text[:50]!r}, whose labels are not all texts; {REMEDY}")
            labels += listed
        else:
            labels += [label.strip() for label in text.split(",")]
    if not all(labels):
        raise UsageError(f"{flag} has an empty label; {REMEDY}")
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UsageError(f"{flag} has {twice[0]!r} twice; name each label once")
    return tuple(labels)


@dataclass(frozen=True, kw_only=True)
class LabelFlags:
    """A user's choices for labels."""

    choices: Annotated[
        tuple[str, ...],
        Flag(
            "Answer each row with the likeliest of these labels, and say how likely it is.",
            "Labels",
            kind=Kind("LABEL,...", labels_of),
            table=True,
        ),
    ] = ()
    choices_column: Annotated[
        str | None,
        Flag("Answer each row with the likeliest of the labels in this column, lists of texts.", "Labels", "COLUMN"),
    ] = None
    choice_probabilities: Annotated[bool, Flag("Write the probabilities of all labels too.", "Labels")] = False

    @property
    def chooses(self) -> bool:
        """True if rows choose from labels, and generate nothing."""
        return bool(self.choices) or self.choices_column is not None
