"""The byte layout of the denoising loop's one allocation: names, offsets and sizes, no torch.

What spans all tokens (residual stream, keys, values) stays; what a chunk of tokens needs is laid
over itself, once per stage of a block, because no two stages live at the same time (design section
5).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from lowvram_kernels.sizes import KEY_TILE

from lowvram.formats import Format
from lowvram.variants import DiTConfig

ALIGNMENT_BYTES = 256
# Reads past the page cache start, end and land on whole pages of this size; a buffer for them needs
# room at both ends and for its start.
PAGE_BYTES = 4096
READ_SLACK_BYTES = 3 * PAGE_BYTES
# Keys are smoothed by the mean of this many tokens, evenly spaced over the clip: a set that no
# budget changes.
SMOOTHING_TOKENS = 256


def aligned(nbytes: int) -> int:
    """The next multiple of 256 bytes."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Workspace:
    """Regions of one allocation: name -> (offset, bytes). Regions of different stages overlap on
    purpose.
    """

    nbytes: int
    regions: dict[str, tuple[int, int]]
    persistent_bytes: int


def value_bytes(code: int) -> int:
    """Bytes of a value as quantized attention keeps it: a code's, or two where `LOWVRAM_PV=fp16`
    multiplies values in fp16.
    """
    return 2 if os.environ.get("LOWVRAM_PV") == "fp16" else code


def dit_workspace(
    config: DiTConfig, format: Format, num_tokens: int, chunk_tokens: int, branches: int
) -> Workspace:
    """The arena of one expert's forward; `branches`: guidance branches that share a visit of a
    block (1 or 2).
    """
    compute, code, quantized = format.float_bytes, format.code_bytes, format.quantized
    dim, ffn, heads, text = config.dim, config.ffn_dim, config.num_heads, config.text_len
    rows = max(chunk_tokens, min(num_tokens, SMOOTHING_TOKENS))
    padded, text_padded = _tiles(num_tokens) * KEY_TILE, _tiles(text) * KEY_TILE
    persistent = {f"residual.{branch}": num_tokens * dim * 4 for branch in range(branches)}
    value = value_bytes(code) if quantized else code
    persistent |= {"keys": num_tokens * dim * code, "values": padded * dim * value}
    persistent |= {"text_keys": text * dim * code, "text_values": text_padded * dim * value}
    if quantized:
        persistent |= {
            "key_scales": num_tokens * heads * 4,
            "value_scales": _tiles(num_tokens) * dim * 4,
        }
        persistent |= {
            "text_key_scales": text * heads * 4,
            "text_value_scales": _tiles(text) * dim * 4,
        }
    scales = {"row_scales": rows * 4} if quantized else {}
    wide = max(rows, text)  # the text's keys and values pass through the same regions
    text_scales = {"row_scales": wide * 4} if quantized else {}
    stages = {
        "project": {
            "rows": wide * dim * code,
            **text_scales,
            "projected": 2 * wide * dim * compute,
        },
        "attend": {
            "rows": wide * dim * code,
            **text_scales,
            "projected": rows * dim * compute,
            "queries": rows * dim * code,
            "attended": rows * dim * compute,
            **({"query_scales": rows * heads * 4} if quantized else {}),
        },
        "ffn": {
            "rows": wide * dim * code,
            **text_scales,
            "hidden": rows * ffn * compute,
            "hidden_rows": rows * ffn * code,
        }
        | ({"hidden_scales": rows * 4} if scales else {}),
    }
    return _overlay(persistent, stages)


def _tiles(keys: int) -> int:
    return math.ceil(keys / KEY_TILE)


def _overlay(persistent: dict[str, int], stages: dict[str, dict[str, int]]) -> Workspace:
    regions: dict[str, tuple[int, int]] = {}
    offset = 0
    for name, nbytes in persistent.items():
        regions[name] = (offset, nbytes)
        offset += aligned(nbytes)
    end = offset
    for stage, parts in stages.items():
        cursor = offset
        for name, nbytes in parts.items():
            regions[f"{stage}.{name}"] = (cursor, nbytes)
            cursor += aligned(nbytes)
        end = max(end, cursor)
    return Workspace(end, regions, offset)
