"""The dialects of checkpoints, one row each: how a file is recognised and how a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lowvram.checkpoint.dialects.plain import read_plain
from lowvram.checkpoint.readers.table import TensorReader

SCALE_NAME = re.compile(r"scale|comfy_quant|\._data$|\.qweight$|\.qzeros$|absmax", re.IGNORECASE)
_OFFICIAL = re.compile(r"self_attn\.q\.weight|attn\.q\.weight|decoder\.conv1\.weight")


@dataclass(frozen=True)
class Dialect:
    """A way of storing the weights of linears (formats.md 1).

    looks: whether tensor names and metadata of a file are of it; read: a weight in a floating-point
    dtype by its name in the file, None for a dialect that is recognised but not read.
    """

    name: str
    looks: Callable[[Iterable[str], Mapping[str, str]], bool]
    read: Callable[[TensorReader, str], torch.Tensor] | None = None


def _ending(*suffixes: str) -> Callable[[Iterable[str], Mapping[str, str]], bool]:
    return lambda names, metadata: any(name.endswith(suffixes) for name in names)


def _quanto(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return metadata.get("quantization_format") == "quanto" or _ending("._data")(names, metadata)


def _comfy_quant(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    marked = "_quantization_metadata" in metadata
    return marked or _ending("comfy_quant")(names, metadata)


def _with_scales(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(SCALE_NAME.search(name) and "scale_shift_table" not in name for name in names)


# The first that looks right is taken.
DIALECTS = (
    Dialect("quanto", _quanto),
    Dialect("comfy_quant", _comfy_quant),
    Dialect("comfy scaled_fp8", _ending("scaled_fp8", ".scale_weight")),
    Dialect("weight_scale without markers", _ending(".weight_scale")),
    Dialect("quantized, unknown", _with_scales),
    Dialect(
        "official",
        lambda names, metadata: any(_OFFICIAL.search(name) for name in names),
        read_plain,
    ),
    Dialect("plain", lambda names, metadata: True, read_plain),
)


def dialect_of(names: Iterable[str], metadata: Mapping[str, str]) -> Dialect:
    """The dialect of a file with these tensor names and metadata."""
    names = list(names)
    return next(dialect for dialect in DIALECTS if dialect.looks(names, metadata))
