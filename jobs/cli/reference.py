"""The reference page of flags, made from their declarations: `python -m batchinfer.jobs.cli.reference`."""

from collections.abc import Iterable, Iterator

from batchinfer.flag import Flag, flags_of
from batchinfer.jobs.flags import FLAGS, GROUPS
from batchinfer.jobs.score_flags import ScoreFlags

SCORE_HEAD = """\
# Flags of `batchinfer score`

It has the flags of `run` that do not concern what is generated, and these.
"""
HEAD = """\
# Flags of `batchinfer run`

<!-- Made by `make reference` from the declarations in the code: change those, not this page. -->

`batchinfer run --config FILE.toml` reads flags from a TOML file under the keys named here; '_' may stand for '-'. Paths
in it are relative to the file, and flags with several values take a list. The command line wins over the file.
`--help` prints the same texts as this page.
"""


def page() -> str:
    """The whole page, as Markdown."""
    of_run = [line for group in GROUPS for line in (f"## {group}", "", *_table(group, FLAGS.values()))]
    own = _table("Scores", flags_of(ScoreFlags).values())
    return "\n".join([HEAD, *of_run, SCORE_HEAD, *own])


def _table(group: str, flags: Iterable[Flag]) -> Iterator[str]:
    yield from ("| flag | meaning | allowed | default | key |", "|---|---|---|---|---|")
    for flag in flags:
        if flag.group == group:
            cells = (_usage(flag), flag.help, flag.bound, _code(flag.shown_default), _code(flag.name.replace("_", "-")))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _usage(flag: Flag) -> str:
    if flag.positional:
        return _code(f"{flag.value_name}...")
    short = f"{_code(flag.short)}, " if flag.short else ""
    negative = f", {_code(f'--no-{flag.option[2:]}')}" if flag.type is bool else ""
    return f"{short}{_code(f'{flag.option} {flag.value_name}'.rstrip())}{negative}"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print(page(), end="")
