"""Trying a checkpoint's chat template before the job, in a process of its own, since a template may kill it."""

import multiprocessing
import resource
from multiprocessing.connection import Connection

from batchinfer.errors import Refused
from batchinfer.text.chat import MAX_SECONDS, ArgumentMissing, ChatError, ChatTemplate, TemplateRefused
from batchinfer.text.chat_arguments import Arguments

SECONDS = 60.0  # time for the process to start, try the template and end
ANOTHER = "; take another one with --chat-template or --tokenizer, or give plain prompts"
SAMPLES = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(201)],
    [{"role": "user", "content": "a long text, " * (1 << 16)}],
)


def check_template(template: ChatTemplate, model: str, arguments: Arguments, by_row: bool) -> None:
    """Render some sample conversations with the template, and follow their text through it.

    Raises `Refused` if the template takes too much time or memory, does what its sandbox forbids, or kills the process,
    and if it needs an argument in all samples that is not among `arguments`, unless rows have arguments of their own
    (`by_row`). A template may refuse a sample itself, for instance one with a system message.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_try, args=(sender, template.source, dict(template.variables), dict(arguments), by_row), daemon=True
    )
    process.start()
    sender.close()
    try:
        refusal = receiver.recv() if receiver.poll(SECONDS) else f"did not end within {SECONDS:.0f} seconds{ANOTHER}"
    except EOFError:
        process.join()
        refusal = f"killed the process that tried it (exit code {process.exitcode}){ANOTHER}"
    finally:
        process.kill()
        process.join()
    if refusal is not None:
        raise Refused(f"{model}: the chat template {refusal}")


def _try(
    sender: "Connection[str | None, None]",
    source: str,
    variables: dict[str, str],
    arguments: Arguments,
    by_row: bool,
) -> None:
    """Run the check in the child. Sends None if the template is good, else a predicate that says what it did, and the
    remedy."""
    limit = int(2 * MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template = ChatTemplate.compile(source, variables)
    missing = []
    for messages in SAMPLES:
        try:
            template.follow(messages, None, arguments, template.render(messages, None, arguments))
        except TemplateRefused as error:
            sender.send(str(error).removeprefix("the chat template ") + ANOTHER)
            return
        except ArgumentMissing as error:
            missing.append(str(error).removeprefix("the chat template "))
        except ChatError:
            continue
    sender.send(missing[0] if len(missing) == len(SAMPLES) and not by_row else None)
