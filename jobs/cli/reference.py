"""The reference page of flags, made from their declarations: `python -m batchinfer.jobs.cli.reference`."""

from collections.abc import Iterator

from batchinfer.flag import Flag
from batchinfer.jobs.flags import FLAGS, GROUPS

HEAD = """\
# Flags of `batchinfer run`

<!-- Made by `make reference` from the declarations in the code: change those, not this page. -->

`batchinfer run --config FILE.toml` reads flags from a TOML file under the keys named here; '_' may stand for '-'. Paths
in it are relative to the file, and flags with several values take a list. The command line wins over the file.
`--help` prints the same texts as this page.
"""


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([HEAD, *(line for group in GROUPS for line in _section(group))])


def _section(group: str) -> Iterator[str]:
    yield from (f"## {group}", "", "| flag | meaning | allowed | default | key |", "|---|---|---|---|---|")
    for flag in FLAGS.values():
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
