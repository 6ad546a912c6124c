"""Layout of store files: names, order, dtypes and shapes of their tensors.

A file contains the tensors outside the blocks (`rest`), then block 0, block 1, ...; each block is
one byte range. A block contains the matrices, then their scales, their biases, the small tensors
and the `comfy_quant` markers. Matrices that are multiplied together are adjacent. Every tensor
starts at a multiple of 256 bytes from the block's start (design section 4).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import chain

from lowvram.checkpoint.names import dit_shapes, text_encoder_shapes, vae_shapes
from lowvram.errors import UsageError
from lowvram.formats import FORMATS, ROTATION_GROUP
from lowvram.variants import EXPERTS, ModelConfig

ALIGNMENT_BYTES = 256
DTYPE_BYTES = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}

# Linears of a block, in the order of their matrices: q, k and v are adjacent for a fused product.
DIT_LINEARS = (
    *(f"self_attn.{part}" for part in "qkvo"),
    *(f"cross_attn.{part}" for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)
TEXT_LINEARS = (*(f"attn.{part}" for part in "qkvo"), "ffn.gate.0", "ffn.fc1", "ffn.fc2")
# Tensors outside the blocks are fp32, except those that the official code multiplies in bf16
# (spec section 7).
BF16_REST = ("patch_embedding.", "text_embedding.", "token_embedding.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a store file.

    role: `weight` (quantized), `scale`, `marker` (`comfy_quant` JSON) or `copy`.
    source: official name of the tensor that it is made from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    source: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ComponentLayout:
    """All tensors of one component's file; `format` is the format of its block linears."""

    component: str
    format: str
    rest: tuple[StoredTensor, ...]
    blocks: tuple[tuple[StoredTensor, ...], ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors in file order."""
        return (*self.rest, *chain.from_iterable(self.blocks))

    @property
    def rest_bytes(self) -> int:
        """Bytes of the tensors outside the blocks."""
        return sum(tensor.nbytes for tensor in self.rest)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block; all blocks have the same size."""
        return sum(tensor.nbytes for tensor in self.blocks[0]) if self.blocks else 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the file."""
        return self.rest_bytes + self.block_bytes * len(self.blocks)

    def metadata(self) -> dict[str, str]:
        """Header metadata for ComfyUI: `_quantization_metadata`, or nothing if not quantized."""
        marker = FORMATS[self.format].marker
        if marker is None:
            return {}
        layers = {
            t.name.removesuffix(".comfy_quant"): marker for t in self.tensors if t.role == "marker"
        }
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def marker_bytes(format: str) -> bytes:
    """`comfy_quant` JSON of one layer, padded with spaces to `ALIGNMENT_BYTES`."""
    return json.dumps(FORMATS[format].marker).encode().ljust(ALIGNMENT_BYTES)


def component_format(component: str, format: str) -> str:
    """Format of a component in a store of `format`.

    The VAE is always fp32; the text encoder of a quantized store is int8 without rotation.
    """
    if component == "vae":
        return "fp32"
    if component == "text_encoder" and FORMATS[format].quantized:
        return "int8-plain"
    return format


@cache
def component_layout(component: str, config: ModelConfig, format: str) -> ComponentLayout:
    """Layout of the file of `component` in a store of `format`.

    Raises `UsageError` for an unknown format, or widths that the format does not support.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    kind = component_format(component, format)
    if component in EXPERTS:
        return _blocked(component, kind, dit_shapes(config.dit), DIT_LINEARS, config.dit.num_layers)
    if component == "text_encoder":
        return _blocked(
            component,
            kind,
            text_encoder_shapes(config.text_encoder),
            TEXT_LINEARS,
            config.text_encoder.num_layers,
        )
    shapes = vae_shapes(config.vae)
    return ComponentLayout(
        component, kind, tuple(_copy(name, shape, "F32") for name, shape in shapes.items()), ()
    )


def _copy(name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    return StoredTensor(name, dtype, shape, "copy", name)


def _blocked(
    component: str,
    format: str,
    shapes: dict[str, tuple[int, ...]],
    linears: tuple[str, ...],
    num_layers: int,
) -> ComponentLayout:
    rest_dtype = FORMATS[format].rest
    rest = [name for name in shapes if not name.startswith("blocks.")]
    stored_rest = [
        _copy(name, shapes[name], rest_dtype if name.startswith(BF16_REST) else "F32")
        for name in rest
    ]
    # Largest first, so that a small tensor of odd size does not misalign a larger one.
    stored_rest.sort(key=lambda tensor: -tensor.nbytes)
    own: dict[str, list[str]] = {f"blocks.{index}.": [] for index in range(num_layers)}
    for name in shapes:
        if name.startswith("blocks."):
            own[name[: name.index(".", len("blocks.")) + 1]].append(name)
    blocks = tuple(_block(prefix, names, format, shapes, linears) for prefix, names in own.items())
    for tensor in blocks[0]:
        if tensor.nbytes % ALIGNMENT_BYTES:
            raise UsageError(
                f"{component} {tensor.name} {list(tensor.shape)}: widths must be multiples of 64 "
                f"in a store"
            )
    return ComponentLayout(component, format, tuple(stored_rest), blocks)


def _block(
    prefix: str,
    own: list[str],
    format: str,
    shapes: dict[str, tuple[int, ...]],
    linears: tuple[str, ...],
) -> tuple[StoredTensor, ...]:
    """Tensors of one block in file order; own: official names of all tensors of the block."""
    weights = [f"{prefix}{linear}.weight" for linear in linears]
    biases = [name for linear in linears if (name := f"{prefix}{linear}.bias") in shapes]
    small = [name for name in own if name not in {*weights, *biases}]
    copies = [_copy(name, shapes[name], "F32") for name in (*biases, *small)]
    dtype = FORMATS[format].weights
    if not FORMATS[format].quantized:
        return (*(_copy(name, shapes[name], dtype) for name in weights), *copies)
    for name in weights:
        if FORMATS[format].rotated and shapes[name][1] % ROTATION_GROUP:
            raise UsageError(
                f"{name} {list(shapes[name])}: format {format} rotates groups of {ROTATION_GROUP} "
                f"inputs; use int8-plain or fp8"
            )
    return (
        *(StoredTensor(name, dtype, shapes[name], "weight", name) for name in weights),
        *(
            StoredTensor(f"{name}_scale", "F32", (shapes[name][0], 1), "scale", name)
            for name in weights
        ),
        *copies,
        *(
            StoredTensor(
                f"{prefix}{name}.comfy_quant",
                "U8",
                (ALIGNMENT_BYTES,),
                "marker",
                f"{prefix}{name}.weight",
            )
            for name in linears
        ),
    )
