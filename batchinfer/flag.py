"""`Flag`: the one declaration of a setting, as part of the field that holds it.

    max_tokens: Annotated[int, Flag("Stop an answer after N tokens.", "Sampling", at_least=1)] = 256

The command line, the job file, the checks with their messages and the reference page are made from it.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin


@dataclass(frozen=True)
class Kind:
    """How people write a value that is no plain text or number."""

    metavar: str
    parse: Callable[[str, Any], Any]  # (flag, what is written) -> the value; raises `UsageError` naming the flag
    none: str | None = None  # how None is written, if it can be


@dataclass(frozen=True)
class Flag:
    """What a value means, which values are allowed, and how people give it.

    Name, type and default are those of the field that carries the flag: `flags_of` fills them in.
    """

    help: str  # verb first, complete without its neighbours
    group: str = "Options"  # its section in the help
    metavar: str | None = None
    kind: Kind | None = None
    short: str | None = None  # as "-o"
    positional: bool = False
    names_model: bool = False  # a directory, a GGUF file, or a model on the Hub
    table: bool = False  # JSON on the command line, and a table in a job file if one likes
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    off: float | None = None  # the bound that switches it off
    unit: str = ""
    name: str = ""  # the key of the job file; given only where the field has another name
    type: Any = str
    default: Any = None  # None too where the field has none

    @property
    def option(self) -> str:
        """As on the command line: `--max-tokens`, or `INPUT` for a positional argument."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def value_name(self) -> str:
        """What stands for a value in the help; empty if the flag takes none."""
        named = (
            self.metavar or (self.kind and self.kind.metavar) or ("MODEL" if self.names_model else self.unit.upper())
        )
        plain = get_args(self.type)[0] if self.many else self.type
        return named or {int: "N", float: "NUMBER", Path: "FILE", bool: ""}.get(plain, "TEXT")

    @property
    def many(self) -> bool:
        """Whether it takes several values, as a list in a job file."""
        return get_origin(self.type) is tuple and get_args(self.type)[1] is ...

    @property
    def is_path(self) -> bool:
        """Whether its values are paths, which in a job file are relative to that file."""
        return Path in (self.type, *get_args(self.type))

    @property
    def bound(self) -> str:
        """The values that are allowed, to follow "it must be"; empty if all are."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        least, above, most, below = map(self._shown, (self.at_least, self.above, self.at_most, self.below))
        if least and (most or below):
            text = f"from {least} to {most or f'below {below}'}"
        elif least:
            text = f"{least} or more"
        else:
            lower, upper = above and f"above {above}", f"at most {most}" if most else below and f"below {below}"
            text = " and ".join(filter(None, [lower, upper]))
        return f"{text} {self.unit}".strip()

    @property
    def shown_default(self) -> str:
        """The default as people write it; empty if there is none."""
        if self.default is None:
            return (self.kind and self.kind.none) or ""
        if isinstance(self.default, bool):
            return self.option[2:] if self.default else f"no-{self.option[2:]}"
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return ", ".join(self.default) if self.many else str(self.default)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow the flag's name: "is 0; it must be 1 or more". None if nothing is."""
        if value is None or self._allows(value):
            return None
        return f"is {repr(value) if isinstance(value, str) else value}; it must be {self.bound}"

    def _allows(self, value: Any) -> bool:
        # NaN fails each comparison.
        return (
            (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _shown(self, number: float | None) -> str:
        if number is None:
            return ""
        return f"{number} (off)" if number == self.off else str(number)


def flags_of(declaration: type[Any]) -> dict[str, Flag]:
    """The flags of a dataclass by field, in order; fields without a flag are left out."""
    found = {}
    for field in fields(declaration):
        flag = flag_of(field.name, field.type, None if field.default is MISSING else field.default)
        if flag is not None:
            found[field.name] = flag
    return found


def flag_of(name: str, annotation: Any, default: Any) -> Flag | None:
    """The flag in a field's or parameter's annotation, with its name, type and default; None if there is none."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, *notes = get_args(annotation)
    flag = next((note for note in notes if isinstance(note, Flag)), None)
    return flag and replace(flag, name=flag.name or name, type=_without_none(kind), default=default)


def problems(settings: object) -> Iterator[tuple[Flag, str]]:
    """Each flag whose value in this dataclass is not allowed, and what is wrong with it."""
    for name, flag in flags_of(type(settings)).items():
        if problem := flag.problem(getattr(settings, name)):
            yield flag, problem


def _without_none(kind: Any) -> Any:
    """T of `T | None`."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if NoneType in get_args(kind) else kind
