"""Memory that the DiT and the denoising loop allocate beside blocks and workspace.

The formulas follow the code line by line: they count the tensors that are alive at a phase's peak.
tests/planner/test_allocations.py compares them with every allocation of a run.
"""

from __future__ import annotations

import math

from lowvram_kernels.sizes import KEY_TILE, REFERENCE_ROWS, REFERENCE_VALUES

from lowvram.planner.allocator import (
    LARGE_BYTES,
    SEGMENT_BYTES,
    packed_bytes,
    passing_bytes,
    segments_bytes,
)
from lowvram.planner.workspace import SMOOTHING_TOKENS
from lowvram.request import LatentShape, Workload
from lowvram.store.layout import component_layout
from lowvram.variants import DiTConfig

# Rows that unquantized arithmetic processes at a time.
PLAIN_ROWS = 1024
# fp32 values per channel in `rms_rope`: input, normalized, rotated, temporaries of the rotation.
RMS_ROPE_VALUES = 4.5
FP32 = 4
# Tensors of the latents' shape during a block: the initial and the current latents, the solver's
# sample and two clean samples, the velocities of the previous step and a new one.
LATENTS_IN_BLOCK = 8
# Further ones in the solver, between blocks.
LATENTS_IN_SOLVER = 5
# In the state of a resumed run: latents, sample and two clean samples.
LATENTS_IN_STATE = 4
# Latent values of one token per channel.
PATCH_VALUES = 4


def conditioning_bytes(workload: Workload) -> int:
    """VRAM of both experts' conditioning, which is alive during the whole loop.

    Modulation of all steps, contexts of both prompts, patch embedding and head.
    """
    return 2 * sum(_conditioning_parts(workload))


def loop_rounding_bytes(
    workload: Workload,
    slots: int,
    slot_bytes: int,
    arena_bytes: int,
) -> int:
    """VRAM that torch's allocator reserves beyond the loop's tensors, on a GPU.

    Computed from the long-lived tensors in their order of allocation from an empty cache: slots,
    arena, conditioning of both experts, latents. `PASSING_SEGMENTS` bounds the short-lived ones.
    """
    held = [arena_bytes, *2 * _conditioning_tensors(workload)]
    held += (LATENTS_IN_BLOCK + LATENTS_IN_SOLVER) * [latent_bytes(workload.latents)]
    # which the last of many slots may have opened
    last_segment = SEGMENT_BYTES if slot_bytes < LARGE_BYTES else 0
    return (
        slots * (packed_bytes(slot_bytes) - slot_bytes)
        + last_segment
        + segments_bytes(held)
        - sum(held)
        + passing_bytes()
    )


def _conditioning_tensors(workload: Workload) -> list[int]:
    """Sizes of one expert's tensors that are alive during the whole loop.

    The fields of `Conditioning` and `EmbeddingsAndHead` in their order.
    """
    dit = workload.config.dit
    compute = workload.format.outside_bytes
    row, values = dit.dim * FP32, dit.out_dim * PATCH_VALUES
    time = [workload.steps * row, workload.steps * 6 * row, *2 * [dit.text_len * dit.dim * compute]]
    return [
        *time,
        dit.dim * dit.in_dim * PATCH_VALUES * compute,
        dit.dim * compute,
        values * row,
        values * FP32,
        2 * row,
    ]


def _conditioning_parts(workload: Workload) -> tuple[int, int, int]:
    """Bytes of one expert's conditioning, as (modulation, contexts, embeddings and head).

    Modulation is that of all steps, contexts are those of both prompts.
    """
    dit = workload.config.dit
    compute = workload.format.outside_bytes
    patch = dit.dim * (dit.in_dim * PATCH_VALUES + 1) * compute
    head = (dit.dim + 1) * dit.out_dim * PATCH_VALUES * FP32 + 2 * dit.dim * FP32
    return workload.steps * 7 * dit.dim * FP32, 2 * dit.text_len * dit.dim * compute, patch + head


def conditioning_phase_bytes(workload: Workload, staged: bool) -> tuple[int, int]:
    """(VRAM, RAM) in bytes while the second expert's conditioning is computed.

    One weight at a time is read from the file; `staged`: it is copied to a separate device.
    """
    dit = workload.config.dit
    compute = workload.format.outside_bytes
    weights = {
        tensor.name: tensor.nbytes
        for tensor in component_layout("high_noise", workload.config, workload.format.name).rest
    }
    modulation, contexts, ends = _conditioning_parts(workload)
    biases = (8 * dit.dim + 2 * dit.freq_dim) * FP32  # and the timesteps' angles
    # all of one expert, and the other's modulation
    first = 2 * modulation + contexts + ends + biases
    largest = max(weights.values())
    time = workload.steps * (dit.freq_dim + 3 * dit.dim) * FP32
    # Two padded branches; then both embedded, and one linear's result while its GELU is taken, or
    # both contexts. Weights in another dtype than their file's are copied.
    row = dit.text_len * compute
    padded, copied = 2 * row * dit.text_dim, workload.format.outside != workload.format.rest
    text, read = 0, 0
    for name, rows in (("text_embedding.0.weight", 3), ("text_embedding.2.weight", 4)):
        stored = weights[name]
        widened = stored * compute // workload.format.float_bytes if copied else stored
        text = max(text, padded + rows * row * dit.dim + widened)
        read = max(read, padded + rows * row * dit.dim + widened + (stored if copied else 0))
    features = features_bytes(workload)
    if staged:  # in the end what stays passes through the host
        passing = max(largest, conditioning_bytes(workload))
        return first + max(largest + time, text, contexts + ends), passing + features
    return first + max(time, read - largest, contexts + ends - largest), largest + features


def copied_weight_bytes(workload: Workload) -> list[int]:
    """Sizes of the text embedding's weights where they are copied to another dtype."""
    dit, format = workload.config.dit, workload.format
    if format.outside == format.rest:
        return []
    return [dit.dim * inputs * format.outside_bytes for inputs in (dit.text_dim, dit.dim)]


def features_bytes(workload: Workload) -> int:
    """RAM of the text features of both prompts, which stay on the host."""
    compute = workload.format.outside_bytes
    return 2 * workload.config.dit.text_len * workload.config.dit.text_dim * compute


def latent_bytes(latents: LatentShape) -> int:
    """Bytes of one fp32 tensor of the latents' shape."""
    return math.prod(latents.shape) * FP32


def loop_host_bytes(workload: Workload, staged: bool) -> int:
    """RAM of the loop beside blocks: text features and, with a separate device, the saved state."""
    return features_bytes(workload) + (_saved_state_bytes(workload.latents) if staged else 0)


def _saved_state_bytes(latents: LatentShape) -> int:
    """Bytes of a resumable state, as tensors and as the content of its file."""
    return 2 * LATENTS_IN_STATE * latent_bytes(latents)


def loop_temporaries_bytes(workload: Workload, chunk_tokens: int, references: bool) -> int:
    """Temporary memory of the loop beside arena, slots and latents: that of its largest operation.

    references: ops run as torch references, with fp32 copies of `REFERENCE_ROWS` rows; kernels
    need no temporaries.
    """
    operations = _shared_operations(workload, chunk_tokens)
    if references:  # the device's memory is the host's
        operations["saved state"] = _saved_state_bytes(workload.latents)
    if not workload.format.quantized:
        operations |= _plain_operations(workload, chunk_tokens)
    elif references:
        operations |= _reference_operations(workload, chunk_tokens)
    return max(operations.values())


def _shared_operations(workload: Workload, chunk_tokens: int) -> dict[str, int]:
    """Temporaries of the operations that are torch code on every device."""
    dit = workload.config.dit
    row = dit.dim * FP32
    smoothed = min(workload.num_tokens, SMOOTHING_TOKENS)
    return {
        "solver": LATENTS_IN_SOLVER * latent_bytes(workload.latents),
        "patches": workload.num_tokens * PATCH_VALUES * dit.in_dim * FP32
        + 3 * REFERENCE_ROWS * row,
        "head": workload.num_tokens * PATCH_VALUES * dit.out_dim * FP32 + 3 * REFERENCE_ROWS * row,
        "mean key": int(RMS_ROPE_VALUES * smoothed * row) + _angles_bytes(dit, smoothed),
        "mean key of the text": 3 * dit.text_len * row,
        "angles": _angles_bytes(dit, min(chunk_tokens, workload.num_tokens)) * 2,
    }


def _angles_bytes(config: DiTConfig, tokens: int) -> int:
    """Bytes of cos and sin of `tokens` tokens."""
    return tokens * config.head_dim * FP32


def _reference_operations(workload: Workload, chunk_tokens: int) -> dict[str, int]:
    """Temporaries of the torch references of the ops, counted from their code."""
    dit = workload.config.dit
    chunk = min(chunk_tokens, workload.num_tokens)
    longest = max(chunk, dit.text_len)
    text_rows = min(REFERENCE_ROWS, longest)
    rows = min(REFERENCE_ROWS, chunk)
    smoothed = min(workload.num_tokens, SMOOTHING_TOKENS)
    row, angles = dit.dim * FP32, _angles_bytes(dit, chunk)
    outputs = REFERENCE_VALUES // REFERENCE_ROWS
    heads = _slice_rows(REFERENCE_ROWS * dit.head_dim, dit.num_heads)
    head, scores = rows * dit.head_dim * FP32, rows * KEY_TILE * FP32
    quantized = 4.25 if workload.format.rotated else 2.0
    operations = {
        "quantize": int(quantized * _slice_rows(dit.dim, longest) * row),
        "quantize the tokens of the mean key": smoothed * row
        + int(quantized * _slice_rows(dit.dim, smoothed) * row),
        "gelu": 7 * _slice_rows(dit.ffn_dim, chunk) * dit.ffn_dim * FP32,
        "project": 3 * text_rows * min(outputs, dit.ffn_dim) * FP32,
        "values": 3 * text_rows * row,
        "heads": int(RMS_ROPE_VALUES * _slice_rows(dit.dim, longest) * row) + angles,
        "attention": heads
        * int((6 + KEY_TILE / REFERENCE_ROWS) * head + 2 * scores + 9 * rows * FP32),
    }
    if workload.format.weights == "F8_E4M3":
        for name, inputs in (("ffn.0", dit.dim), ("ffn.2", dit.ffn_dim)):
            operations[f"e4m3 {name}"] = (rows * inputs + outputs * inputs + rows * outputs) * 8
    return operations


def _slice_rows(width: int, count: int) -> int:
    """Rows of `width` values that an element-wise reference processes at a time, of `count`."""
    return min(REFERENCE_ROWS, max(1, REFERENCE_VALUES // width), count)


def _plain_operations(workload: Workload, chunk_tokens: int) -> dict[str, int]:
    dit = workload.config.dit
    compute = workload.format.float_bytes
    chunk = min(chunk_tokens, workload.num_tokens)
    rows = min(PLAIN_ROWS, chunk)
    row = dit.dim * FP32
    return {
        "adaln": 2 * rows * row,
        "gelu": rows * dit.ffn_dim * compute,
        "add": rows * dit.dim * (compute + FP32 if compute != FP32 else FP32),
        "heads": int(RMS_ROPE_VALUES * min(PLAIN_ROWS, max(chunk, dit.text_len)) * row)
        + _angles_bytes(dit, chunk),
        "attention": rows * dit.dim * compute,
    }
