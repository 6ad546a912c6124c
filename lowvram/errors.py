"""One class per cause. A message says what is wrong, where, and what to do about it, in one
line.
"""

from __future__ import annotations


class LowvramError(Exception):
    """Any failure that the user can act on; the command line prints it as one line and exits with
    1.
    """

    exit_code = 1


class UsageError(LowvramError):
    """The request itself is wrong: an option, a size, a number of frames."""

    exit_code = 2


class CheckpointError(LowvramError):
    """A checkpoint on disk is damaged, incomplete or not what it claims to be."""


class HeaderError(CheckpointError):
    """A safetensors file breaks a rule of the format. `rule`: its name, of
    `checkpoint.readers.safetensors_header.RULES`.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class MissingTensorsError(CheckpointError):
    """Tensors are missing, unexpected, or have the wrong shape; the message names them all at
    once.
    """


class UnsafeFileError(CheckpointError):
    """Reading the file could run code or leave its folder: a pickle, an absolute or climbing shard
    name.
    """


class IntegrityError(CheckpointError):
    """Bytes differ from the hash in the manifest; the message names the tensor."""


class NonFiniteError(CheckpointError):
    """Weights hold NaN or infinity; the message names the tensors and counts."""


class OutputError(LowvramError):
    """The output exists already, is locked by another run, or cannot be written."""


class ResumeError(LowvramError):
    """An interrupted run cannot be continued with this request; the message names both values."""


class DiskFullError(OutputError):
    """The file system has too little room; nothing under the final name was touched."""


class BudgetError(LowvramError):
    """No plan fits the budgets; the message gives the smallest that would."""


class OutOfMemoryError(LowvramError):
    """Memory that the plan counts on is not there, because other programs have it. `budget`: VRAM
    or RAM.
    """

    def __init__(self, message: str, budget: str) -> None:
        super().__init__(message)
        self.budget = budget


class UnsupportedError(LowvramError):
    """No backend can run the operation here; the message gives each backend's reason."""


class NumericsError(LowvramError):
    """NaN or infinity in the latents; the message names step, expert and block."""


class InternalLimitError(LowvramError):
    """More memory was asked of the arena or the ring than the plan granted: a defect of lowvram,
    never of the user.
    """
