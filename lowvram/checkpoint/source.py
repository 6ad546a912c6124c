"""Open an unquantized model in any supported layout, under official names, and validate it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from lowvram.checkpoint.dialects.table import Dialect, dialect_of
from lowvram.checkpoint.layouts.parts import Parts, Rename
from lowvram.checkpoint.layouts.table import layout_of, model_folder
from lowvram.checkpoint.readers.files import links_allowed
from lowvram.checkpoint.readers.safetensors_header import TensorInfo
from lowvram.checkpoint.readers.shards import RawTensors, fingerprint_texts, named
from lowvram.checkpoint.readers.tensor_data import Rows
from lowvram.checkpoint.validate import (
    WrongExpertError,
    check_config,
    check_dialect,
    check_experts,
    expected_shapes,
    problems,
    raise_problems,
)
from lowvram.errors import CheckpointError
from lowvram.variants import COMPONENTS, EXPERTS, ModelConfig

# Second name of the tied embedding: transformers may store it under both.
TIED = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class ComponentSource:
    """The tensors of one component by official name; `stored` maps to the names in the files.

    merge: what is merged into a weight when it is read, from its name and its rows, such as LoRAs;
    merged: texts that say what that is.
    """

    component: str
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]
    raw: RawTensors
    dialect: Dialect
    merge: Callable[[str, Rows], Rows] = lambda name, rows: rows
    merged: tuple[str, ...] = ()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in a floating-point dtype. Raises `CheckpointError`."""
        rows = self.rows(name)
        return rows[:].reshape(self.tensors[name].shape)

    def rows(self, name: str) -> Rows:
        """The tensor as a matrix whose rows are read when they are asked for; a vector is one row.

        Raises `CheckpointError`.
        """
        if name not in self.stored:
            raise CheckpointError(f"{self.raw.where} holds no tensor {name[:120]!r}")
        stored, rows = self.stored[name], self.dialect.rows
        if rows is None:
            raise CheckpointError(f"{self.raw.where}: the dialect {self.dialect.name} is not read")
        return self.merge(name, rows(self.raw, stored))

    def fingerprint(self) -> str:
        """Hash of tensor names, dtypes, shapes and samples, and of the files' sizes and times."""
        return hashlib.sha256(
            "\n".join([*fingerprint_texts(self.raw), *self.merged]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Source:
    """A validated unquantized model: all tensors are present and of the right shapes."""

    path: Path
    layout: str
    config: ModelConfig
    components: dict[str, ComponentSource]
    tokenizer: bytes

    def __enter__(self) -> Source:
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
        for component in self.components.values():
            for reader in set(component.raw.readers.values()):
                reader.close()


def open_source(path: Path, allow_pickle: bool = False, allow_links: bool = False) -> Source:
    """Open and validate the model in the folder `path`; reads headers and configs, no weights.

    Raises `MissingTensorsError`, listing all tensors of all components that are missing, unexpected
    or of the wrong shape; `UnsafeFileError` for a pickle without `allow_pickle` or a path out of
    the folder without `allow_links`; `CheckpointError` for any other defect.
    """
    path = model_folder(path)
    with links_allowed(allow_links):
        parts = _read_parts(path, allow_pickle)
    check_config(path, parts.config)
    check_experts(parts.raw)
    components, texts, strange = {}, [], []
    for component in COMPONENTS:
        raw = parts.raw[component]
        dialect = dialect_of(raw.infos, raw.metadata)
        tensors, stored, unknown = _rename(component, raw, parts.renames[component], dialect)
        expected = expected_shapes(parts.config, component)
        extra = [name for name in tensors if name not in expected]
        check_dialect(component, raw, dialect, unknown + extra)
        texts += problems(component, raw.where, tensors, expected, unknown)
        strange += unknown + extra
        components[component] = ComponentSource(component, tensors, stored, raw, dialect)
    raise_problems(texts, strange)
    return Source(path, parts.layout, parts.config, components, parts.tokenizer)


def check_distinct_experts(source: Source) -> None:
    """Raise `WrongExpertError` if all tensors of the two experts are equal.

    Small tensors are compared first: those of two trained experts differ, and nothing else is read.
    """
    high, low = (source.components[name] for name in EXPERTS)
    if high.tensors.keys() != low.tensors.keys():
        return
    for name in sorted(high.tensors, key=lambda name: high.tensors[name].nbytes):
        one, other = high.read(name), low.read(name)
        if one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other)):
            return
    raise WrongExpertError(
        f"{high.raw.where} and {low.raw.where} hold the same weights, but the model needs both "
        f"experts: download the other one"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read_parts(path: Path, allow_pickle: bool) -> Parts:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give the folder of the whole model")
    if (path / "lowvram.json").exists():
        raise CheckpointError(
            f"{path} is a quantized store: give the unquantized model that it was made from"
        )
    return layout_of(path).read(path, allow_pickle)


def _rename(
    component: str, raw: RawTensors, rename: Rename, dialect: Dialect
) -> tuple[dict[str, TensorInfo], dict[str, str], list[str]]:
    """Tensors by official names, the names in the files, and names that the model does not have."""
    stored: dict[str, str] = {}
    unknown, repeated = [], []
    weights = [name for name in raw.infos if not dialect.consumes(name)]
    for name in sorted(weights, key=lambda item: item == TIED):
        official = rename(name)
        if official is None:
            unknown.append(name)
        elif official not in stored:
            stored[official] = name
        elif name != TIED or raw.infos[name].shape != raw.infos[stored[official]].shape:
            repeated.append(name)
    if repeated:
        raise CheckpointError(
            f"{raw.where}: {len(repeated)} tensors of {component} occur under two names: "
            f"{named(repeated)}; download it again"
        )
    tensors = {
        official: _renamed_info(raw.infos[name], official) for official, name in stored.items()
    }
    return tensors, stored, unknown


def _renamed_info(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape, info.start, info.end)
