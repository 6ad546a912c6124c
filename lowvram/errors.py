"""Exceptions of lowvram, one class per cause.

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class LowvramError(Exception):
    """Base class of all errors that the user can act on.

    The command line prints the message and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(LowvramError):
    """The request is invalid: an option, a size, a number of frames."""

    exit_code = 2


class CheckpointError(LowvramError):
    """A checkpoint on disk is damaged, incomplete or of an unsupported kind."""


class HeaderError(CheckpointError):
    """A safetensors file breaks a rule of the format.

    rule: the rule's name, a key of `checkpoint.readers.safetensors_header.RULES`.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class MissingTensorsError(CheckpointError):
    """Tensors are missing, unexpected or of the wrong shape; the message lists all of them."""


class UnsafeFileError(CheckpointError):
    """Reading the file could run code or leave the model folder.

    Raised for pickles, and for absolute shard names or names with `..`.
    """


class IntegrityError(CheckpointError):
    """Data do not match their hash in the manifest; the message names the tensor."""


class NonFiniteError(CheckpointError):
    """Weights contain NaN or infinity; the message names and counts the tensors."""


class OutputError(LowvramError):
    """The output already exists, is locked by another run, or cannot be written."""


class ResumeError(LowvramError):
    """An interrupted run does not match this request; the message gives both values."""


class DiskFullError(OutputError):
    """The file system is full; no file under its final name has changed."""


class BudgetError(LowvramError):
    """No plan fits the budgets; the message gives the smallest budget that would fit."""


class OutOfMemoryError(LowvramError):
    """Planned memory is not available because other programs use it.

    budget: which memory, `VRAM` or `RAM`.
    """

    def __init__(self, message: str, budget: str) -> None:
        super().__init__(message)
        self.budget = budget


class LoraError(CheckpointError):
    """A LoRA that is damaged, or for another model or expert; the message names the key."""


class UnsupportedError(LowvramError):
    """No backend can run the operation on this machine; the message gives each one's reason."""


class NumericsError(LowvramError):
    """The latents contain NaN or infinity; the message names step, expert and block."""


class InternalLimitError(LowvramError):
    """An allocation exceeds the plan: a bug in lowvram, not an error of the user."""
