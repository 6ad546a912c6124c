"""The dialects of checkpoints, one row each: how a file is recognised and how a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lowvram.checkpoint.dialects.plain import plain_rows
from lowvram.checkpoint.readers.shards import RawTensors
from lowvram.checkpoint.readers.tensor_data import Rows

SCALE_NAME = re.compile(r"scale|comfy_quant|\._data$|\.qweight$|\.qzeros$|absmax", re.IGNORECASE)
_OFFICIAL = re.compile(r"self_attn\.q\.weight|attn\.q\.weight|decoder\.conv1\.weight")


WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Dialect:
    """A way of storing the weights of linears (formats.md 1).

    looks: whether tensor names and metadata of a file are of it; rows: a weight in a floating-point
    dtype by its name in the file, None for a dialect that is recognised but not read; companions:
    names of the scales and markers that `rows` consumes; dtypes: of weights in the file.
    """

    name: str
    looks: Callable[[Iterable[str], Mapping[str, str]], bool]
    rows: Callable[[RawTensors, str], Rows] | None = None
    companions: re.Pattern[str] | None = None
    dtypes: tuple[str, ...] = WEIGHT_DTYPES

    def consumes(self, name: str) -> bool:
        """Whether the tensor is a scale or marker of another tensor."""
        return self.companions is not None and bool(self.companions.search(name))


def is_scale(name: str) -> bool:
    """Whether a tensor's name is that of a scale or marker in any dialect."""
    return bool(SCALE_NAME.search(name)) and "scale_shift_table" not in name


def _ending(*suffixes: str) -> Callable[[Iterable[str], Mapping[str, str]], bool]:
    return lambda names, metadata: any(name.endswith(suffixes) for name in names)


def _quanto(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return metadata.get("quantization_format") == "quanto" or _ending("._data")(names, metadata)


def _comfy_quant(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    marked = "_quantization_metadata" in metadata
    return marked or _ending("comfy_quant")(names, metadata)


def _with_scales(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(is_scale(name) for name in names)


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
        plain_rows,
    ),
    Dialect("plain", lambda names, metadata: True, plain_rows),
)


def dialect_of(names: Iterable[str], metadata: Mapping[str, str]) -> Dialect:
    """The dialect of a file with these tensor names and metadata."""
    names = list(names)
    return next(dialect for dialect in DIALECTS if dialect.looks(names, metadata))
