"""A job's flags on the command line: making a command's parameters from their declarations, and its help in
sections."""

import inspect
from collections.abc import Callable
from functools import partial
from types import GenericAlias
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from batchinfer.errors import UsageError
from batchinfer.flag import Flag, flag_of
from batchinfer.jobs.flags import FLAGS, GROUPS, SCORE_FLAGS

NUMBERS = {int: "a whole number", float: "a number"}
RunArguments = Annotated[
    list[str],
    typer.Argument(metavar="RUN_ARGUMENTS", help="After '--', the arguments that `batchinfer run` would be given."),
]


def takes(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these fields of a job, and the flags that annotate its own parameters.

    The command gets the values by name of field or parameter. A value out of bounds raises `UsageError`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags, parameters = {}, []
        for parameter in inspect.signature(command).parameters.values():
            required = parameter.default is parameter.empty
            flag = flag_of(parameter.name, parameter.annotation, None if required else parameter.default)
            if flag is not None:
                flags[parameter.name] = flag
                parameters.append(_parameter(flag, required))
            elif parameter.name not in fields and parameter.kind is not parameter.VAR_KEYWORD:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        known = FLAGS | SCORE_FLAGS
        flags |= {field: known[field] for field in fields}
        parameters += [_parameter(known[field]) for field in fields]

        def called(**written: Any) -> None:
            given = {name: _value(flag, written.pop(flag.name)) for name, flag in flags.items()}
            command(**written, **given)

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def described(flag: Flag) -> str:
    """Return a flag's help, with its bound and default in brackets."""
    facts = [flag.bound, f"default: {flag.shown_default}" if flag.shown_default else ""]
    known = "; ".join(filter(None, facts))
    return f"{flag.help}  [{known}]" if known else flag.help


class SectionedCommand(TyperCommand):
    """A command whose help has a section for its own options, and one for each group of a job's flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections as plain text."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", "Options", *GROUPS)}
        for parameter in self.get_params(ctx):
            argument = parameter.param_type_name == "argument"
            group = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[group].append((str(parameter.metavar), record[1]) if argument else record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _parameter(flag: Flag, required: bool = False) -> inspect.Parameter:
    """Return the parameter that typer reads. It is text if the flag's kind parses it, and its default is None if
    `_value` fills in the default."""
    single: Any = str if flag.kind else get_args(flag.type)[0] if flag.many else flag.type
    plain: Any = GenericAlias(list, (single,)) if flag.many else single
    default = None if flag.many or flag.kind else flag.default
    shared: dict[str, Any] = {
        "help": described(flag),
        "metavar": flag.value_name or None,
        "show_default": False,
        "rich_help_panel": flag.group,
    }
    if single in NUMBERS:
        shared["parser"] = partial(_number, flag, single)
    if flag.positional:
        declaration = typer.Argument(**shared)
    else:
        negative = f"/--no-{flag.option[2:]}" if flag.type is bool else ""
        declaration = typer.Option(*filter(None, [flag.short]), f"{flag.option}{negative}", **shared)
    written = plain if required or default is not None else plain | None
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[written, declaration],
    )


def _number(flag: Flag, kind: type, written: Any) -> Any:
    try:
        return kind(str(written))
    except ValueError as error:
        wanted = ", ".join(filter(None, [NUMBERS[kind], flag.bound]))
        raise UsageError(f"{flag.option} is {written!r}; it must be {wanted}") from error


def _value(flag: Flag, written: Any) -> Any:
    if written is None or written == []:
        return flag.default
    value = flag.kind.parse(flag.option, written) if flag.kind else tuple(written) if flag.many else written
    if problem := flag.problem(value):
        raise UsageError(f"{flag.option} {problem}")
    return value
