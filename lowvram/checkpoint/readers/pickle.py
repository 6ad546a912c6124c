"""Read `.pth` files, if the user allows pickles.

torch's restricted unpickler runs over the description of the tensors alone; their data are read
from the places that it names, as those of other files.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from lowvram.checkpoint.readers.files import LFS_POINTER, refuse_pointer
from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.checkpoint.readers.tensor_data import DTYPE_CODES, TORCH_DTYPES, Rows, TensorData
from lowvram.errors import CheckpointError, UnsafeFileError

# The restricted unpickler of earlier versions is unsafe (CVE-2025-32434, CVE-2026-24747).
MINIMUM_TORCH = (2, 10)
PICKLE_CAP_BYTES = 4 * 2**20  # the description of Wan's 242 tensors takes 0.03 MB
RECORDS_CAP = 65536


class _View(NamedTuple):
    """A tensor that does not lie in its storage as it is: its info is that of the storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class PickleFile(TensorData):
    """A flat dict of tensors in a `.pth` file."""

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
        _check_archive(path)
        self._views: dict[str, _View] = {}
        self._places: dict[str, TensorInfo] = {}
        tensors = {
            name: self._describe(path, name, tensor)
            for name, tensor in _tensors(path, _load(path)).items()
        }
        super().__init__(path, tensors, path.stat().st_size)

    @property
    def metadata(self) -> dict[str, str]:
        """Empty: a pickle holds none that is read."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, contiguous. Raises `CheckpointError`."""
        view = self._views.get(name)
        if view is None:
            return super().read(name)
        place = self._places[name]
        storage = self._bytes(place, 0, place.nbytes).view(TORCH_DTYPES[place.dtype])
        return storage.as_strided(view.shape, view.strides, view.offset).contiguous()

    def rows(self, name: str) -> Rows:
        """The tensor `name` as a matrix; see `TensorData.rows`."""
        if name not in self._views:
            return super().rows(name)
        tensor = self.read(name)
        return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)

    def sample(self, name: str) -> bytes:
        """Samples of the data; see `TensorData.sample`."""
        if name not in self._views:
            return super().sample(name)
        return self.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()

    def _describe(self, path: Path, name: str, tensor: torch.Tensor) -> TensorInfo:
        where = f"{path}: tensor {quoted(name)}"
        if tensor.dtype not in DTYPE_CODES:
            raise CheckpointError(f"{where} has the unsupported dtype {tensor.dtype}")
        dtype, shape, item = DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.element_size()
        storage = tensor.untyped_storage()
        # where its data begin in the file (torch's notes on serialization)
        start = getattr(storage, "_checkpoint_offset", None)
        if not isinstance(start, int):
            raise CheckpointError(f"{where} has no data in the file: save it again with torch.save")
        nbytes, held = tensor.numel() * item, storage.nbytes()
        if nbytes > held:
            raise CheckpointError(
                f"{where} {list(shape)} takes {nbytes} bytes, but the file holds {held} of it: it "
                f"repeats them: save a contiguous copy of it"
            )
        if tensor.is_contiguous():
            begin = start + int(tensor.storage_offset()) * item
            return TensorInfo(name, dtype, shape, begin, begin + nbytes)
        self._views[name] = _View(shape, tuple(tensor.stride()), int(tensor.storage_offset()))
        self._places[name] = TensorInfo(name, dtype, (held // item,), start, start + held)
        return TensorInfo(name, dtype, shape, start, start + nbytes)


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise UnsafeFileError(
            f"reading a pickle needs torch >= 2.10 (found {torch.__version__}): older versions "
            f"can run code hidden in it"
        )


def _check_archive(path: Path) -> None:
    """Raise `CheckpointError` unless the file is an archive whose records lie in it as they are."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            refuse_pointer(path, file.read(len(LFS_POINTER)))
            if not zipfile.is_zipfile(file):
                raise CheckpointError(
                    f"{path} is not a readable .pth file (no zip archive, as torch.save has "
                    f"written since 1.6): download it again"
                )
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _unreadable(path, error) from error
    if len(records) > RECORDS_CAP:
        raise CheckpointError(
            f"{path} has {len(records)} records, above the limit of {RECORDS_CAP}: download it "
            f"again"
        )
    for record in records:
        pickled = record.filename.endswith(".pkl")
        if record.compress_type != zipfile.ZIP_STORED or (
            pickled and record.file_size > PICKLE_CAP_BYTES
        ):
            raise UnsafeFileError(
                f"{path}: the record {quoted(record.filename)} is compressed or larger than a "
                f"description of tensors ({record.file_size} bytes): download it again"
            )


def _load(path: Path) -> object:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    try:
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
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
    except Exception as error:  # hostile content makes torch raise whatever it meets
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable .pth file: {' '.join(str(error).split())[:300]}: "
        f"download it again"
    )


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
        isinstance(value, torch.Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )
