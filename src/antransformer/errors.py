"""The few exceptions that a user can cause, and the one that a machine can.

The command line prints the message of either as a single line. ``UsageError`` ends with exit status 2 (the input can
be put right), ``MachineError`` with 1 (the disk is full, the run diverged).
"""


class AntransformerError(Exception):
    """Base of every error that this package raises on purpose; its message is one line, whatever is named in it."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).splitlines()))


class UsageError(AntransformerError, ValueError):
    """The caller's input is wrong; the message says what is wrong, where, and what would be right."""


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class DataError(UsageError):
    """Text, a tokenizer or a prepared data folder can not be used."""


class CheckpointError(UsageError):
    """A run folder or checkpoint can not be used for what was asked."""


class NewerCheckpointError(CheckpointError):
    """A checkpoint was written by a newer release: it is whole, and must not be passed over or replaced."""


class MissingExtraError(UsageError):
    """An optional dependency is needed; the message names the extra to install."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'antransformer[{extra}]'")


class MachineError(AntransformerError):
    """Not the user's mistake: the disk, a device, or the run itself failed."""


class DivergedError(MachineError):
    """A loss, gradient or weight is not finite: the run can not go on, and in a comparison that is its result."""


class WriteError(MachineError):
    """A checkpoint could not be written, as all processes of a run learn together; the one before it is whole."""


class RunStoppedError(AntransformerError):
    """A signal ended the run after its checkpoint was written; ``status`` is the exit status that the shell expects."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number
