"""Byte layout of the denoising loop's workspace: names, offsets and sizes. No torch.

Buffers for all tokens (residual stream, keys, values) have their own bytes. Buffers for a chunk of
tokens share theirs between the stages of a block, because the stages run one after the other
(design section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowvram_kernels.sizes import EXACT_VALUES, KEY_TILE, STORED_VALUES

from lowvram.formats import Format
from lowvram.variants import DiTConfig

ALIGNMENT_BYTES = 256
# Direct reads (O_DIRECT) start and end at pages of this size, in the file and in memory; their
# buffers need room for that at both ends and for the alignment of their start.
PAGE_BYTES = 4096
READ_SLACK_BYTES = 3 * PAGE_BYTES
# Keys are smoothed by the mean of this many tokens, evenly spaced over the clip, independent of the
# budgets.
SMOOTHING_TOKENS = 256


def aligned(nbytes: int) -> int:
    """Round up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Workspace:
    """Regions of one allocation, as name -> (offset, bytes); regions of different stages overlap.

    nbytes: size of the allocation; persistent_bytes: the part that all stages share.
    """

    nbytes: int
    regions: dict[str, tuple[int, int]]
    persistent_bytes: int


def dit_workspace(
    config: DiTConfig,
    format: Format,
    num_tokens: int,
    chunk_tokens: int,
    branches: int,
    values: str = "int8",
    refined: bool = False,
) -> Workspace:
    """Workspace of one expert's forward pass.

    branches: guidance branches that share a visit of a block (1 or 2); values: how quantized
    self attention stores values, a key of `STORED_VALUES`; refined: some steps quantize to two
    codes and store values as `EXACT_VALUES` (`Request.refine_steps`).
    """
    compute, code, quantized = format.float_bytes, format.code_bytes, format.quantized
    dim, ffn, heads, text = config.dim, config.ffn_dim, config.num_heads, config.text_len
    rows = max(chunk_tokens, min(num_tokens, SMOOTHING_TOKENS))
    persistent = {f"residual.{branch}": num_tokens * dim * 4 for branch in range(branches)}
    for prefix, tokens, stored in (("", num_tokens, values), ("text_", text, EXACT_VALUES)):
        memory = {"keys": tokens * dim * code, "values": tokens * dim * code}
        if quantized:
            memory = _quantized_memory(tokens, dim, heads, stored)
        if refined:
            exact = _quantized_memory(tokens, dim, heads, EXACT_VALUES)
            memory = {name: max(nbytes, exact[name]) for name, nbytes in memory.items()}
        persistent |= {f"{prefix}{name}": nbytes for name, nbytes in memory.items()}
    codes = 2 if refined else 1  # of an input of a linear
    # The text's keys and values use the regions of the chunk's. Its context has two int8 codes.
    text_codes = text * (2 if format.weights == "I8" else 1)
    wide, coded = max(rows, text), max(codes * rows, text_codes)
    inputs = {"rows": coded * dim * code, **({"row_scales": coded * 4} if quantized else {})}
    stages = {
        "project": inputs | {"projected": 2 * wide * dim * compute},
        "attend": inputs
        | {
            "projected": rows * dim * compute,
            "queries": rows * dim * code,
            "attended": rows * dim * compute,
        }
        | ({"query_scales": rows * heads * 4} if quantized else {}),
        "ffn": inputs
        | {"hidden": rows * ffn * compute, "hidden_rows": codes * rows * ffn * code}
        | ({"hidden_scales": codes * rows * 4} if quantized else {}),
    }
    return _overlay(persistent, stages)


def _quantized_memory(tokens: int, dim: int, heads: int, values: str) -> dict[str, int]:
    """Bytes of int8 keys, of values stored as `values`, and of the scales of both."""
    stored, tiles = STORED_VALUES[values], math.ceil(tokens / KEY_TILE)
    columns = tiles * KEY_TILE if stored.scaled else tokens
    return {
        "keys": tokens * dim,
        "values": columns * dim * stored.value_bytes,
        # A head's scales begin at a multiple of `KEY_TILE`, which the kernel's copies need.
        "key_scales": tiles * KEY_TILE * heads * 4,
        "value_scales": 2 * tiles * dim * 4 if stored.scaled else 0,
    }


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
