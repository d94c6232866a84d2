"""`Flag`: declares a setting once, in the annotation of the field that holds it.

    max_tokens: Annotated[int, Flag("Stop an answer after N tokens.", "Sampling", at_least=1)] = 256

The command line, the job file, the checks with their messages and the reference page are made from this declaration.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin


@dataclass(frozen=True)
class Kind:
    """How a value that is no plain text or number is written."""

    metavar: str
    parse: Callable[[str, Any], Any]  # (flag, written value) -> value; raises `UsageError` naming the flag
    none: str | None = None  # how None is written; None if it cannot be


@dataclass(frozen=True)
class Flag:
    """What a setting means, which values are allowed, and how it is written.

    `flags_of` fills in `name`, `type` and `default` from the field that carries the flag.
    """

    help: str  # begins with a verb, and is complete without other flags' help
    group: str = "Options"  # section of the help
    metavar: str | None = None
    kind: Kind | None = None
    short: str | None = None  # short form, such as "-o"
    positional: bool = False
    names_model: bool = False  # the value is a directory, a GGUF file, or a model on the Hub
    names_file: bool = False  # the value may be the name of a file that has it
    table: bool = False  # written as JSON on the command line, and as JSON or a table (a list if `many`) in a job file
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    off: float | None = None  # the bound that switches the setting off
    unit: str = ""
    name: str = ""  # key in the job file; given only if it differs from the field's name
    type: Any = str
    default: Any = None  # None also if the field has no default

    @property
    def option(self) -> str:
        """The flag as written on the command line: `--max-tokens`, or `INPUT` for a positional argument."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def value_name(self) -> str:
        """The placeholder for the value in the help; empty if the flag takes no value."""
        named = (
            self.metavar or (self.kind and self.kind.metavar) or ("MODEL" if self.names_model else self.unit.upper())
        )
        plain = get_args(self.type)[0] if self.many else self.type
        return named or {int: "N", float: "NUMBER", Path: "FILE", bool: ""}.get(plain, "TEXT")

    @property
    def many(self) -> bool:
        """True if the setting takes several values; in a job file they are a list."""
        return get_origin(self.type) is tuple and get_args(self.type)[1] is ...

    @property
    def is_path(self) -> bool:
        """True if the values are paths; in a job file they are relative to that file."""
        return Path in (self.type, *get_args(self.type))

    @property
    def bound(self) -> str:
        """The allowed values, worded to follow "it must be"; empty if all values are allowed."""
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
        """The default as it is written on the command line; empty if there is none."""
        if self.default is None:
            return (self.kind and self.kind.none) or ""
        if isinstance(self.default, bool):
            return self.option[2:] if self.default else f"no-{self.option[2:]}"
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return ", ".join(self.default) if self.many else str(self.default)

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value, worded to follow the flag's name: "is 0; it must be 1 or more".

        Return None if the value is allowed.
        """
        if value is None or self._allows(value):
            return None
        return f"is {repr(value) if isinstance(value, str) else value}; it must be {self.bound}"

    def _allows(self, value: Any) -> bool:
        # NaN fails every comparison, so it is not allowed where there is a bound.
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


@cache
def flags_of(declaration: type[Any]) -> Mapping[str, Flag]:
    """Return the flags of a dataclass by field name, in order; fields without a flag are left out."""
    found = {}
    for field in fields(declaration):
        flag = flag_of(field.name, field.type, None if field.default is MISSING else field.default)
        if flag is not None:
            found[field.name] = flag
    return found


def flag_of(name: str, annotation: Any, default: Any) -> Flag | None:
    """Return the flag in a field's or parameter's annotation, with name, type and default filled in, or None."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, *notes = get_args(annotation)
    flag = next((note for note in notes if isinstance(note, Flag)), None)
    return flag and replace(flag, name=flag.name or name, type=_without_none(kind), default=default)


def problems(settings: object) -> Iterator[tuple[Flag, str]]:
    """Yield each flag whose value in `settings`, a dataclass, is not allowed, and what is wrong with it."""
    declaration: Any = type(settings)
    for name, flag in flags_of(declaration).items():
        if problem := flag.problem(getattr(settings, name)):
            yield flag, problem


def _without_none(kind: Any) -> Any:
    """Return T for `T | None`, and any other type unchanged."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if NoneType in get_args(kind) else kind
