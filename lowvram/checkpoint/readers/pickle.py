"""Imports `.pth` files: the one place where pickle is read, only when asked for, and only with
torch's restricted unpickler.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from lowvram.checkpoint.readers.safetensors import DTYPE_CODES
from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.errors import CheckpointError, UnsafeFileError

# earlier restricted unpicklers could be got round (CVE-2025-32434, CVE-2026-24747)
MINIMUM_TORCH = (2, 10)


class PickleFile:
    """A flat dict of tensors in a `.pth` file. Each `read` maps the file anew, so its pages go when
    that one tensor dies.
    """

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        """Raises `UnsafeFileError` without `allow_pickle`, on a torch before 2.10, and for content
        other than tensors.
        """
        if not allow_pickle:
            raise UnsafeFileError(
                f"{path} is a pickle, which can hold code: use a .safetensors file in its place, "
                f"or, if you trust its origin, "
                "allow it with --allow-pickle (it is read with torch's restricted unpickler, "
                "never any other)"
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
        tensor = _tensors(self.path, _load(self.path)).get(name)
        if tensor is None or _describe(self.path, name, tensor) != self.tensors.get(name):
            raise CheckpointError(
                f"{self.path} holds no tensor {quoted(name)}, or was changed since it was opened"
            )
        return tensor.contiguous()

    def close(self) -> None:
        """Nothing stays open between reads."""


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise UnsafeFileError(
            f"reading a pickle needs torch >= 2.10 (found {torch.__version__}): older ones "
            f"can be made to run code"
        )


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = (
            str(error)
            .split("Check the documentation")[0]
            .split("WeightsUnpickler error:")[-1]
            .strip()
        )
        raise UnsafeFileError(
            f"{path} holds more than tensors and was not run: {' '.join(reason.split())[:300]}"
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
        raise CheckpointError(f"{path} does not hold a flat dict of tensors")
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
