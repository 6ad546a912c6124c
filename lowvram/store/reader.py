"""Open and validate a store, whose files consist of equal, contiguous blocks."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from lowvram.checkpoint.readers.files import inside, links_allowed, read_bytes
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.checkpoint.readers.shards import named
from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.errors import CheckpointError, IntegrityError, MissingTensorsError, UsageError
from lowvram.files.limits import TOKENIZER_FILE_BYTES
from lowvram.store.hashes import TensorHashes
from lowvram.store.layout import StoredTensor, component_layout
from lowvram.store.manifest import TOKENIZER_NAME, Manifest, component_file, read_manifest
from lowvram.variants import COMPONENTS, ModelConfig

# A small trained tensor of each file: its hash detects swapped files at little cost.
_SAMPLES = {
    "high_noise": "head.modulation",
    "low_noise": "head.modulation",
    "text_encoder": "norm.weight",
    "vae": "decoder.conv1.bias",
}
# Of a table that is read by rows, for its hash.
_PIECE_BYTES = 4 * 2**20
_BLOCK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(.+)")


class BlockRange(NamedTuple):
    """Byte range of one block; `start` is an offset from the beginning of the file."""

    start: int
    nbytes: int


class BlockTensor(NamedTuple):
    """One tensor of each block; `offset` is in bytes from the start of the block."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class StoreFile:
    """The open file of one component.

    rest: tensors outside the blocks; blocks: byte range of each block; block_tensors: the tensors
    of every block, by name without `blocks.i.`; hashes: compared with each tensor when it is first
    read, None to read without.
    The constructor raises `CheckpointError` for a file that is not block-contiguous.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        self.header = self._file.header
        self.rest: dict[str, TensorInfo] = {}
        self.blocks: list[BlockRange] = []
        self.block_tensors: dict[str, BlockTensor] = {}
        self.hashes: TensorHashes | None = None
        self._read_blocks()

    def __enter__(self) -> StoreFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """Copy the tensor with the full `name`, so that later disk failures do not affect it.

        See `TensorFile.read`. Raises `CheckpointError`, and `IntegrityError` for a tensor that
        differs from its hash.
        """
        tensor = self._file.read(name)
        if self.hashes is not None and (self.is_modified() or self.hashes.missing([name])):
            self.hashes.check(name, _bytes(tensor))
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Copy rows of the tensor with the full `name`; see `TensorFile.read_rows`.

        At the first call the whole tensor is read in pieces for its hash. Raises as `read`.
        """
        if name not in self._file.tensors:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)} is missing")
        if self.hashes is not None and (self.is_modified() or self.hashes.missing([name])):
            self.hashes.check_pieces(name, self._file.pieces(name, _PIECE_BYTES))
        return self._file.read_rows(name, rows)

    def is_modified(self) -> bool:
        """Whether the file was written to since it was opened: everything is compared again."""
        return self._file.is_modified()

    @property
    def modified_ns(self) -> int:
        """When the file was last written to before it was opened."""
        return self._file.modified_ns

    def checks(self, block: int, data: torch.Tensor) -> list[Callable[[], None]]:
        """Comparisons of a block with its hashes, to run on any thread.

        data: the block, [nbytes] uint8 on the CPU. Each raises `IntegrityError`.
        """
        if self.hashes is None:
            return []
        return self.hashes.tasks(
            {
                f"blocks.{block}.{name}": _bytes(data[offset : offset + _nbytes(dtype, shape)])
                for name, (dtype, shape, offset) in self.block_tensors.items()
            }
        )

    def is_checked(self, block: int) -> bool:
        """Whether all tensors of the block have been compared with their hashes, or none are."""
        names = [f"blocks.{block}.{name}" for name in self.block_tensors]
        return self.hashes is None or not self.hashes.missing(names)

    def _read_blocks(self) -> None:
        groups: list[list[TensorInfo]] = []
        position = self.header.data_start
        for name, info in self.header.tensors.items():
            if info.start != position:
                raise self._foreign(
                    f"the offset of tensor {quoted(name)} does not match its position in the header"
                )
            position = info.end
            match = _BLOCK_NAME.fullmatch(name)
            if match is None and not groups:
                self.rest[name] = info
            elif match and int(match[1]) == len(groups):
                groups.append([info])
            elif match and int(match[1]) == len(groups) - 1:
                groups[-1].append(info)
            else:
                raise self._foreign(f"tensor {quoted(name)} is out of order")
        for index, group in enumerate(groups):
            self._add_block(index, group)

    def _add_block(self, index: int, group: list[TensorInfo]) -> None:
        start, prefix = group[0].start, f"blocks.{index}."
        tensors = {
            info.name.removeprefix(prefix): BlockTensor(info.dtype, info.shape, info.start - start)
            for info in group
        }
        if index == 0:
            self.block_tensors = tensors
        elif list(tensors.items()) != list(self.block_tensors.items()):
            raise self._foreign(f"the layout of block {index} differs from block 0")
        self.blocks.append(BlockRange(start, group[-1].end - start))

    def _foreign(self, what: str) -> CheckpointError:
        self.close()
        return CheckpointError(
            f"{self.path}: {what}: not a file of a quantized store, quantize again"
        )


@dataclass(frozen=True)
class Store:
    """An open store; each file has exactly the tensors of the layout for its config and format."""

    path: Path
    manifest: Manifest
    config: ModelConfig
    format: str
    files: dict[str, StoreFile]
    tokenizer: bytes

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; tensors that were read stay valid."""
        for file in self.files.values():
            file.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def open_store(path: Path, sample: bool = True, allow_links: bool = False) -> Store:
    """Open the store in the folder `path` and check its headers against the manifest.

    sample: also check the hash of one small tensor per file, which detects swapped files. Every
    other tensor is compared with its hash when it is first read. allow_links: open files through
    links that point out of the folder.
    Raises `MissingTensorsError`, listing the differences from the layout in all files;
    `IntegrityError` for samples that differ from the manifest; `CheckpointError` for any other
    defect.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: give the output folder of `lowvram quantize`"
        )
    with links_allowed(allow_links):
        return _opened(path, sample)


def _opened(path: Path, sample: bool) -> Store:
    manifest = read_manifest(path)
    missing = [
        component_file(name) for name in COMPONENTS if not (path / component_file(name)).exists()
    ]
    missing += [] if (path / TOKENIZER_NAME).exists() else [TOKENIZER_NAME]
    if missing:
        raise CheckpointError(f"{path} lacks {named(missing)}: quantize again or restore it")
    tokenizer = read_bytes(
        path, path / TOKENIZER_NAME, TOKENIZER_FILE_BYTES, "quantize again or restore it"
    )
    if hashlib.sha256(tokenizer).hexdigest() != manifest.tokenizer_sha256:
        raise IntegrityError(
            f"{path / TOKENIZER_NAME} differs from its hash in the manifest: quantize again "
            f"or restore it"
        )
    store = Store(path, manifest, manifest.config, manifest.format, {}, tokenizer)
    try:
        _open_files(store)
        if sample:
            _check_samples(store)
        for component, file in store.files.items():
            file.hashes = TensorHashes(file.path, manifest.components[component].tensors)
    except BaseException:
        store.close()
        raise
    return store


def _open_files(store: Store) -> None:
    texts = []
    for component in COMPONENTS:
        file = StoreFile(inside(store.path, store.path / component_file(component)))
        store.files[component] = file
        texts += _differences(component, file, store.manifest)
    if texts:
        raise MissingTensorsError(f"{'; '.join(texts)}: quantize again or restore the files")


def _check_samples(store: Store) -> None:
    texts = []
    for component, name in _SAMPLES.items():
        data = _bytes(store.files[component].read(name))
        digest = hashlib.sha256(data).hexdigest()
        if digest != store.manifest.components[component].tensors[name]:
            owners = [
                other
                for other in COMPONENTS
                if store.manifest.components[other].tensors.get(name) == digest
            ]
            origin = f" (it is the tensor of {owners[0]})" if owners else ""
            texts.append(
                f"{store.files[component].path}: {name} differs from its hash in the "
                f"manifest{origin}"
            )
    if texts:
        advice = (
            f"quantize again or restore the file; `lowvram inspect {store.path} --verify` "
            f"lists all differences"
        )
        raise IntegrityError(f"{'; '.join(texts)}: {advice}")


def _differences(component: str, file: StoreFile, manifest: Manifest) -> list[str]:
    """Compare a file with its layout and with the manifest; one text per kind of difference."""
    try:
        wanted = {
            tensor.name: tensor
            for tensor in component_layout(component, manifest.config, manifest.format).tensors
        }
    except UsageError as error:
        raise CheckpointError(
            f"{file.path.parent}: config and format of the manifest are incompatible: {error}: "
            f"quantize again"
        ) from error
    found, hashes = file.header.tensors, manifest.components[component].tensors
    kinds = {
        "are missing": [name for name in wanted if name not in found],
        "are unexpected": [name for name in found if name not in wanted],
        "have the wrong dtype or shape": [
            name for name in wanted if name in found and not _agrees(wanted[name], found[name])
        ],
        "have no hash in the manifest": [name for name in wanted if name not in hashes],
    }
    if not any(kinds.values()) and list(wanted) != list(found):
        kinds["are in the wrong order"] = _moved(list(wanted), list(found))
    return [
        f"{file.path}: {len(names)} tensors {what}: {named(names)}"
        for what, names in kinds.items()
        if names
    ]


def _agrees(wanted: StoredTensor, found: TensorInfo) -> bool:
    return (wanted.dtype, wanted.shape) == (found.dtype, found.shape)


def _moved(wanted: Sequence[str], found: Sequence[str]) -> list[str]:
    return [name for name, other in zip(wanted, found, strict=True) if name != other]
