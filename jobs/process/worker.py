"""A child process that holds an engine, and its pipe to the job.

The parent process never imports torch. The child ignores signals, which the parent handles, writes all that it prints
to the run's log, and ends with the parent. The parent reads and writes the pipe in threads, so that it never waits for
a busy child.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pkgutil
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batchinfer.errors import EngineFailed, EngineKilled, Refused
from batchinfer.jobs.process.interruption import ignoring_signals
from batchinfer.jobs.process.messages import (
    Admitted,
    Command,
    Completed,
    Drain,
    Engine,
    Fault,
    Finished,
    Heartbeat,
    Message,
    Ready,
    Rows,
    Stop,
)
from batchinfer.jobs.process.safe_errors import described, traced
from batchinfer.jobs.process.samples import SampledEngine
from batchinfer.text.tokenizer import Tokenizer

HEARTBEAT_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Worker:
    """The parent's handle of a child process that runs `life(pipe, *arguments)`.

    Importing the module of `life` must not load torch.
    """

    def __init__(self, log: Path, life: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, log, life, arguments), daemon=True)
        with ignoring_signals():
            self._process.start()
        theirs.close()
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self._pipe.recv())
        except (EOFError, OSError):
            self._messages.put(None)

    def _write(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                self._pipe.send(command)
            except OSError:  # the child is dead, which `receive` reports
                return

    def send(self, command: Command) -> None:
        """Send a command without waiting, even if the child is busy. If the child is dead, `receive` reports it."""
        self._commands.put(command)

    def receive(self, timeout: float) -> Message | None:
        """Return the next message, or None after `timeout` seconds.

        Raises `Refused` or `EngineFailed` for a `Fault`, and `EngineFailed` or `EngineKilled` once the child is dead.
        """
        try:
            message = self._messages.get(timeout=timeout) if timeout > 0 else self._messages.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            self._process.join()
            killed = self._process.exitcode == -signal.SIGKILL
            said = f"the engine's process {self._death()}; its log is {self._log}"
            raise EngineKilled(said) if killed else EngineFailed(said)
        if isinstance(message, Fault):
            if message.refused:
                raise Refused(message.text)
            raise EngineFailed(f"the engine failed: {message.text}; the traceback is in {self._log}")
        return message

    def _death(self) -> str:
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def close(self) -> None:
        """Kill the child if it still runs."""
        self._process.kill()
        self._process.join()
        self._commands.put(None)
        for thread in self._threads:
            thread.join()
        self._pipe.close()


def serve(pipe: Any, log: Path, life: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run the child: call `life`, and send an unexpected error to the parent as a `Fault`."""
    _print_to(log)
    _die_with_parent()
    try:
        life(pipe, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        sys.stderr.writelines(traced(error))
        pipe.send(Fault(described(error), refused=False))


def _die_with_parent() -> None:
    """Have the system kill this process when the parent dies. Otherwise it would notice only at the end of a step."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _print_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def run_engine(pipe: "Connection[Message, Command]", engine_name: str) -> None:
    """Run a job's engine in the child: load it, take rows, step and report, until the parent ends it."""
    make_engine = pkgutil.resolve_name(engine_name)  # imported here, while the parent still tokenizes
    order: Any = pipe.recv()
    try:
        engine: Engine = make_engine(order.config, Tokenizer.load(order.config.model, order.tokenizer, chats=False))
    except (ValueError, OSError) as error:
        traceback.print_exc()
        pipe.send(Fault(str(error), refused=True))
        return
    if order.samples:
        engine = SampledEngine(engine)
    pipe.send(Ready(engine.stats()))
    draining = False
    last_beat = time.monotonic()
    while engine.unfinished or not draining:
        if not engine.unfinished or pipe.poll():
            match pipe.recv():
                case Rows(requests):
                    engine.add(requests)
                case Drain():
                    draining = True
                case Stop():
                    break
            continue
        completions = engine.step()
        if admitted := engine.take_admitted():
            pipe.send(Admitted(admitted))
        if len(completions):
            pipe.send(Completed(completions))
        if time.monotonic() - last_beat >= HEARTBEAT_SECONDS:
            pipe.send(Heartbeat(engine.stats()))
            last_beat = time.monotonic()
    pipe.send(Finished(engine.stats()))
