"""Read `.pth` files with torch's restricted unpickler, if the user allows pickles."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from lowvram.checkpoint.readers.files import LFS_POINTER, refuse_pointer
from lowvram.checkpoint.readers.safetensors import DTYPE_CODES
from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.errors import CheckpointError, UnsafeFileError

# The restricted unpickler of earlier versions is unsafe (CVE-2025-32434, CVE-2026-24747).
MINIMUM_TORCH = (2, 10)


class PickleFile:
    """A flat dict of tensors in a `.pth` file.

    Each `read` maps the file again, so its pages are freed together with the tensor that was read.
    """

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        """Open the file and describe its tensors.

        Raises `UnsafeFileError` without `allow_pickle`, with torch < 2.10, and for content other
        than tensors; `CheckpointError` for an unreadable file.
        """
        if not allow_pickle:
            raise UnsafeFileError(
                f"{path} is a pickle, which can contain code: use a .safetensors file instead, "
                f"or, if you trust its origin, "
                "pass --allow-pickle (it is read with torch's restricted unpickler only)"
            )
        _check_torch()
        self.path = path
        self.tensors = {
            name: _describe(path, name, tensor)
            for name, tensor in _tensors(path, _load(path)).items()
        }

    @property
    def metadata(self) -> dict[str, str]:
        """Empty: a pickle holds none that is read."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, contiguous. Raises `CheckpointError`, also for a changed file."""
        tensor = _tensors(self.path, _load(self.path)).get(name)
        if tensor is None or _describe(self.path, name, tensor) != self.tensors.get(name):
            raise CheckpointError(
                f"{self.path} has no tensor {quoted(name)}, or has changed since it was opened"
            )
        return tensor.contiguous()

    def close(self) -> None:
        """Do nothing: no file stays open between reads."""


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise UnsafeFileError(
            f"reading a pickle needs torch >= 2.10 (found {torch.__version__}): older versions "
            f"can run code hidden in it"
        )


def _load(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            refuse_pointer(path, file.read(len(LFS_POINTER)))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = (
            str(error)
            .split("Check the documentation")[0]
            .split("WeightsUnpickler error:")[-1]
            .strip()
        )
        raise UnsafeFileError(
            f"{path} contains more than tensors and was not loaded: "
            f"{' '.join(reason.split())[:300]}"
        ) from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        AssertionError,
    ) as error:
        raise CheckpointError(
            f"{path} is not a readable .pth file: {' '.join(str(error).split())[:300]}: "
            f"download it again"
        ) from error


def _tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} does not contain a flat dict of tensors")
    odd = [name for name, value in content.items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(
            f"{path}: {len(odd)} entries are not plain tensors: "
            f"{', '.join(quoted(name) for name in odd[:4])}"
        )
    return content


def _is_plain(value: object) -> bool:
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _describe(path: Path, name: str, tensor: torch.Tensor) -> TensorInfo:
    if tensor.dtype not in DTYPE_CODES:
        raise CheckpointError(
            f"{path}: tensor {quoted(name)} has the unsupported dtype {tensor.dtype}"
        )
    return TensorInfo(
        name,
        DTYPE_CODES[tensor.dtype],
        tuple(tensor.shape),
        0,
        tensor.numel() * tensor.element_size(),
    )
