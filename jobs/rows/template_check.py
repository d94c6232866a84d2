"""A checkpoint's chat template, tried before the job in a process that may die of it."""

import multiprocessing
import resource
from multiprocessing.connection import Connection

from batchinfer.errors import Refused
from batchinfer.text.chat import MAX_SECONDS, ChatError, ChatTemplate, TemplateRefused

SECONDS = 60.0  # of the clock, for the process to start and to end
SAMPLES = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(201)],
    [{"role": "user", "content": "a long text, " * (1 << 16)}],
)


def check_template(template: ChatTemplate, model: str) -> None:
    """Render some conversations. Raises `Refused` where the template takes too much time or memory, does what its
    sandbox forbids, or is the end of the process; that it takes no system message, say, is its own affair.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(sender, template.source, dict(template.variables)), daemon=True)
    process.start()
    sender.close()
    try:
        refusal = receiver.recv() if receiver.poll(SECONDS) else f"did not end within {SECONDS:.0f} seconds"
    except EOFError:
        process.join()
        refusal = f"was the end of the process that tried it (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()
    if refusal is not None:
        raise Refused(f"{model}: the chat template {refusal}; take another with --tokenizer, or give plain prompts")


def _try(sender: "Connection[str | None, None]", source: str, variables: dict[str, str]) -> None:
    """The child: None is sent where all is well, else the end of a sentence about the template."""
    limit = int(2 * MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template = ChatTemplate.compile(source, variables)
    for messages in SAMPLES:
        try:
            template.render(messages)
        except TemplateRefused as error:
            sender.send(str(error).removeprefix("the chat template "))
            return
        except ChatError:
            continue
    sender.send(None)
