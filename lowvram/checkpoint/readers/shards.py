"""Open the file or the shards of one component, under the names stored in them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch

from lowvram.checkpoint.readers.files import check_plain_name, inside, read_json
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.checkpoint.readers.table import READERS, TensorReader
from lowvram.checkpoint.readers.tensor_data import Rows
from lowvram.errors import CheckpointError, MissingTensorsError

# Keys of metadata whose values name the model.
TITLES = ("title", "name", "model", "modelspec.title", "general.name", "ss_output_name")


@dataclass
class RawTensors:
    """All tensors of one component, by stored name, and their files.

    names: file names and titles, which tell the experts apart; notes: other texts of the metadata,
    which may mention either.
    """

    where: Path
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    readers: dict[str, TensorReader] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the files. Raises `CheckpointError`."""
        return self.readers[name].read(name)

    def rows(self, name: str) -> Rows:
        """A tensor as a matrix whose rows are read when they are asked for."""
        return self.readers[name].rows(name)

    def add(self, path: Path, reader: TensorReader) -> None:
        """Raises `CheckpointError` where another shard has a tensor of the same name."""
        infos = reader.tensors
        repeated = [name for name in infos if name in self.infos]
        if repeated:
            raise CheckpointError(
                f"{path} repeats {len(repeated)} tensors of another shard: {named(repeated)}; "
                f"download both again"
            )
        self.infos |= infos
        self.readers |= dict.fromkeys(infos, reader)
        self.files.append(path)
        self.names.append(path.name)
        for key, value in reader.metadata.items():
            (self.names if key in TITLES else self.notes).append(value)
        self.metadata |= reader.metadata


def named(names: list[str], limit: int = 6) -> str:
    """Format a list of names for a message: the first `limit` and the number of the others."""
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + rest


def open_safetensors(root: Path, path: Path, into: RawTensors) -> None:
    """Open one safetensors file and add its tensors."""
    into.add(path, TensorFile(inside(root, path)))


def open_one(root: Path, stem: str, allow_pickle: bool) -> RawTensors:
    """The tensors of `stem` with the first suffix of `READERS` that is there.

    Raises `CheckpointError` where there is none, `UnsafeFileError` for a refused pickle.
    """
    paths = [root / f"{stem}{reader.suffix}" for reader in READERS]
    for reader, path in zip(READERS, paths, strict=True):
        if path.exists():
            raw = RawTensors(path)
            raw.add(path, reader.open(inside(root, path), allow_pickle))
            return raw
    others = ", ".join(path.name for path in paths[1:])
    raise CheckpointError(f"{root} lacks {paths[0].name} (or {others}): download it")


def open_folder(root: Path, folder: Path) -> RawTensors:
    """Open the shards that the index of a folder names, or the folder's only safetensors file.

    Raises `CheckpointError`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing or is not a folder: download it again")
    inside(root, folder)
    indexes = _listed(folder, "*.safetensors.index.json")
    files = _listed(folder, "*.safetensors")
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} contains {len(indexes)} index files: "
            f"{named([path.name for path in indexes])}; keep the right one"
        )
    if indexes:
        return _open_indexed(root, folder, indexes[0], files)
    if len(files) != 1:
        text = (
            f"{folder} contains {len(files)} .safetensors files and no .safetensors.index.json "
            f"for its shards"
        )
        raise CheckpointError(f"{text}: download the index" + ("" if files else " and the shards"))
    raw = RawTensors(folder)
    open_safetensors(root, files[0], raw)
    return raw


def _listed(folder: Path, pattern: str) -> list[Path]:
    """Matching files, without those in which macOS keeps attributes on other file systems."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


def _open_indexed(root: Path, folder: Path, index: Path, files: list[Path]) -> RawTensors:
    weight_map = read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(value, str) for value in weight_map.values()
    ):
        raise CheckpointError(
            f"{index} has no weight_map from tensor names to file names: download it again"
        )
    shards = sorted({check_plain_name(name, index) for name in weight_map.values()})
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        count = f"{len(missing)} of the {len(shards)} shards"
        raise CheckpointError(
            f"{folder} lacks {count} that {index.name} names: {named(missing)}; download them"
        )
    stray = [path.name for path in files if path.name not in shards]
    if stray:
        raise CheckpointError(
            f"{folder} contains {named(stray)}, which {index.name} does not name: remove files "
            f"that do not belong to the model"
        )
    raw = RawTensors(folder)
    homes: dict[str, str] = {}
    for name in shards:
        known = set(raw.infos)
        open_safetensors(root, folder / name, raw)
        homes |= {tensor: name for tensor in raw.infos if tensor not in known}
    lost = [tensor for tensor, name in weight_map.items() if homes.get(tensor) != name]
    if lost:
        text = f"{len(lost)} tensors are not in the shard that {index.name} names"
        raise MissingTensorsError(f"{folder}: {text}: {named(lost)}; download it again")
    return raw


def fingerprint_texts(raw: RawTensors) -> list[str]:
    """Texts that identify the content of a component without reading all of it.

    One per tensor (name, dtype, shape and the hash of samples of its data) and one per file (size
    and modification time).
    """
    tensors = [
        json.dumps(
            [name, info.dtype, info.shape, sha256(raw.readers[name].sample(name)).hexdigest()]
        )
        for name, info in sorted(raw.infos.items())
    ]
    status = [path.stat() for path in sorted(raw.files)]
    return tensors + [f"{item.st_size} {item.st_mtime_ns}" for item in status]
