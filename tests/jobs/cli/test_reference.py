"""The page of flags is what the declarations say."""

from repository import ROOT

from batchinfer.flag import flags_of
from batchinfer.jobs.cli.reference import page
from batchinfer.jobs.flags import FLAGS, GROUPS
from batchinfer.jobs.score_flags import ScoreFlags


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "flags.md").read_text() == page(), "give `make reference`"


def test_every_flag_has_one_row() -> None:
    rows = [line for line in page().splitlines() if line.startswith(("| `--", "| `-o", "| `INPUT"))]
    assert len(rows) == len(FLAGS) + len(flags_of(ScoreFlags))
    assert {flag.group for flag in FLAGS.values()} == set(GROUPS)
    assert all(sum(flag.help in row for row in rows) == 1 for flag in FLAGS.values())
