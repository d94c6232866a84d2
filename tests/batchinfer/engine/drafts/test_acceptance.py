"""How likely drafts are right: by evidence, by what came of the last ones, and the first apart from those behind it."""

import numpy as np
import pytest

from batchinfer.engine.drafts.acceptance import Acceptance


def test_where_the_first_is_right_the_others_mostly_are() -> None:
    """Half of the drafts are wrong from the first token on, half are right to the end: not 71 % of each token."""
    acceptance = Acceptance(1, 4)
    place, kind = np.array([0]), np.array([0])
    for i in range(1000):
        acceptance.of(place, np.array([i]), kind, 8)  # another sequence each time
        acceptance.observe(place, kind, np.array([8]), np.array([8 * (i % 2)]))
    likely = acceptance.of(place, np.array([1000]), kind, 8)[0]
    assert likely == pytest.approx([0.5] * 8, abs=0.03)


def test_evidence_and_history_are_told_apart() -> None:
    acceptance = Acceptance(2, 2)
    places, epochs, kinds = np.array([0, 1]), np.array([7, 8]), np.array([0, 1])
    for _ in range(200):
        acceptance.of(places, epochs, kinds, 4)
        acceptance.observe(places, kinds, np.array([4, 4]), np.array([4, 0]))
    right, wrong = acceptance.of(places, epochs, kinds, 4)
    assert right.min() > 0.9 and wrong.max() < 0.05
    new = acceptance.of(places, epochs + 2, kinds, 4)[:, 0]
    both = (1 + 2.4) / (2 + 4)  # of sequences that begin two drafts were seen, one of each kind, and the prior
    assert new == pytest.approx([(1 + 4 * both) / 5, 4 * both / 5])


def test_of_what_nothing_was_seen_is_taken_to_be_like_the_others() -> None:
    acceptance = Acceptance(3, 1)
    place, epoch, unseen = np.array([0]), np.array([0]), np.array([2])
    assert acceptance.of(place, epoch, unseen, 1)[0, 0] == 0.6
    for i in range(40):
        acceptance.of(place, epoch, np.array([i % 2]), 1)
        acceptance.observe(place, np.array([i % 2]), np.array([1]), np.array([0]))
    assert acceptance.of(place, epoch, unseen, 1)[0, 0] < 0.1


def test_what_was_wrong_is_tried_again_some_day() -> None:
    acceptance = Acceptance(1, 1)
    place, epoch, kind = np.array([0]), np.array([0]), np.array([0])
    for _ in range(50):
        acceptance.of(place, epoch, kind, 1)
        acceptance.observe(place, kind, np.array([1]), np.array([0]))
        acceptance.fade()
    before = acceptance.of(place, epoch, kind, 1)[0, 0]
    for _ in range(3000):
        acceptance.fade()
    assert before < 0.1 and acceptance.of(place, epoch, kind, 1)[0, 0] > 0.5
