"""The command line. An error is one line on stderr and an exit code, never a traceback.

The engine's process imports this module again, as part of the program that started it. So each command imports large
modules itself, only when it runs.
"""

import os
import platform
import sys
import tempfile
from typing import Annotated, NoReturn

import typer

from batchinfer import __version__
from batchinfer.errors import EXIT_CODES, EngineFailed, Interrupted, Refused, UsageError, exit_code

# Checked before the imports below, some of which exist on Linux only.
if platform.system() != "Linux":
    print(
        f"batchinfer: error: this system is {platform.system()}; batchinfer runs on Linux only: use a Linux machine, "
        "virtual machine or container",
        file=sys.stderr,
    )
    sys.exit(EXIT_CODES[Refused])

from batchinfer.jobs.cli import cron, models, outputs, plan, ray, run, score, slurm
from batchinfer.jobs.log import asked_for, say_error, write_as
from batchinfer.jobs.process.safe_errors import told, traced

# pyarrow chooses its allocator when it is loaded. The system's frees large cells at once; pyarrow's default keeps them.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

app = typer.Typer(rich_markup_mode=None)
for part in (run, score, plan, models, outputs, cron, ray):
    app.add_typer(part.app)
app.add_typer(slurm.app, name="slurm")


def main() -> NoReturn:
    """Run a command and exit with its code. This is the program's entry point."""
    write_as(asked_for(sys.argv))  # errors of a command line that cannot be read included
    try:
        sys.exit(app(prog_name="batchinfer", standalone_mode=False))
    except typer.TyperException as error:
        _fail(error.format_message(), EXIT_CODES[UsageError])
    except (UsageError, Refused, EngineFailed, Interrupted, OSError) as error:
        _fail(told(error), exit_code(error))
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="batchinfer-", suffix=".log", delete=False) as log:
            log.writelines(traced(error))
        _fail(f"{told(error)}; the traceback is in {log.name}", exit_code(error))


def _fail(message: str, code: int) -> NoReturn:
    say_error(message, code)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"batchinfer {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run a language model over a table of prompts, and get the table back with answers."""
    if context.invoked_subcommand is None:
        print(context.get_help())
