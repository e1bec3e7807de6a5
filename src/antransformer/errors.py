"""Exceptions of this package.

The command line prints the message of each as one line. ``UsageError`` gives exit status 2 (the user can correct the
input), ``MachineError`` exit status 1 (for example a full disk or a diverged run).
"""

from typing import Any


class AntransformerError(Exception):
    """Base class of all errors that this package raises on purpose. Line breaks in the message become spaces."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).splitlines()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes, since subclasses have other arguments."""
        return _restored, (type(self), str(self), self.__dict__)


def _restored(kind: type[AntransformerError], message: str, attributes: dict[str, Any]) -> AntransformerError:
    error = kind.__new__(kind, message)
    error.__dict__.update(attributes)
    return error


class UsageError(AntransformerError, ValueError):
    """The caller's input is wrong. The message says what is wrong, where, and what would be right."""


class ConfigError(UsageError):
    """A setting has an unknown name or a wrong value."""


class DataError(UsageError):
    """Text, a tokenizer or a prepared data folder cannot be used."""


class CheckpointError(UsageError):
    """A run folder or checkpoint cannot be used for the requested purpose."""


class NewerCheckpointError(CheckpointError):
    """A newer release wrote the checkpoint. It is intact, so it must be neither skipped nor replaced."""


class MissingExtraError(UsageError):
    """An optional dependency is missing. The message names the extra to install."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'antransformer[{extra}]'")


class MachineError(AntransformerError):
    """The disk, a device or the run itself failed; the input is not wrong."""


class DivergedError(MachineError):
    """A loss, gradient or weight is NaN or Inf, so the run cannot continue. A comparison records it as a result."""


class WriteError(MachineError):
    """A checkpoint could not be written. All ranks raise it together, and the previous checkpoint is intact."""


class RunStoppedError(AntransformerError):
    """A signal stopped the run after its checkpoint was written.

    Attributes:
        status: exit status that a shell expects after the signal.
        at_once: whether a second signal stopped this process, without the other ranks.
    """

    def __init__(self, message: str, signal_number: int, at_once: bool = False) -> None:
        super().__init__(message)
        self.status, self.at_once = 128 + signal_number, at_once


class RankFailedError(AntransformerError):
    """A rank that ``--processes`` started has failed. The message is the line that the rank would print.

    Attributes:
        status: exit status of the rank.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
