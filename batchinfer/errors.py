"""What users can cause: the errors that end a command, and its exit code for each."""


class UsageError(Exception):
    """A flag or a key of the job file is wrong: exit 2."""


class Refused(Exception):
    """The data, the model, the output or the system cannot be used as asked: exit 65."""


class EngineFailed(Exception):
    """The engine's process raised or died: exit 70."""


class EngineKilled(EngineFailed):
    """It was killed by SIGKILL, which is what the system does where memory is short."""


class Interrupted(Exception):
    """The job was told to stop; what was finished is committed: exit 75."""


EXIT_CODES: dict[type[BaseException], int] = {
    UsageError: 2,
    Refused: 65,
    EngineFailed: 70,
    OSError: 74,
    Interrupted: 75,
    KeyboardInterrupt: 130,  # a second Ctrl-C
}


def exit_code(error: BaseException | None) -> int:
    """What a command exits with that ends by this error: 70 for a fault of our own, 0 for none."""
    if error is None:
        return 0
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 70)
