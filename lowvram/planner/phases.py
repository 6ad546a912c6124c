"""What each phase of a run allocates beside blocks and workspace, in bytes: pure arithmetic, no
torch.

The formulas follow the code line by line: which tensors live at the moment of a phase's peak.
tests/planner/test_allocations.py holds them against every allocation that a run makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowvram.planner.allocator import (
    LARGE_BYTES,
    SEGMENT_BYTES,
    SMALL_SEGMENT_BYTES,
    packed_bytes,
    segments_bytes,
)
from lowvram.planner.workspace import KEY_TILE, QUANTIZED_FORMATS, SMOOTHING_TOKENS, element_bytes
from lowvram.request import LatentShape
from lowvram.store.layout import component_layout
from lowvram.variants import ModelConfig, VAEConfig

# The torch references work on this many rows of a product and this many fp32 values at a time
# (`lowvram_kernels.slices`), the unquantized yardstick on `PLAIN_ROWS`.
REFERENCE_ROWS = 256
REFERENCE_VALUES = 1 << 17
# Of one piece of the vocabulary, once the `tokenizers` library has read it: 2.3 kB were measured.
TOKENIZER_BYTES = 2560
PLAIN_ROWS = 1024
TEXT_HEADS_AT_ONCE = 8
# fp32 values per channel that `rms_rope` holds: input, normalised, rotated, and halves of pairs in
# the making.
RMS_ROPE_VALUES = 4.5
FP32 = 4
INT64 = 8
VAE_TILE_PIXELS = 256
VAE_TILE_OVERLAP_PIXELS = 64
VAE_TILE_MARGIN_PIXELS = 16
# Latents alive beside a block at work: those that the run began with, the current ones, the
# solver's sample and two clean samples, the velocities of the step before and one new one. The
# solver, when no block is at work, holds five more.
LATENTS_IN_BLOCK = 8
LATENTS_IN_SOLVER = 5
# A resumed run has four from the start: latents, the sample and two clean samples.
LATENTS_IN_STATE = 4
# torch convolves smaller inputs (channels x frames x rows) on a CPU by unfolding them.
UNFOLDED_BELOW_VALUES = 20480
PATCH_VALUES = 4  # latent cells of one token, per channel
# Segments of either kind that short-lived tensors open beside those of the buffers that a phase is
# known to hold.
PASSING_SEGMENTS = 3
# The decoder's tensors are large and of many sizes: of its working set, what lies idle between
# them. Replays of its allocations through a model of the allocator came to 0.24 to 0.46; not
# measured on a GPU.
DECODE_ROUNDING_SHARE = 0.5


def conditioning_bytes(config: ModelConfig, format: str, steps: int) -> int:
    """VRAM that lives through the loop, of both experts: modulation of every step, both prompts'
    context, patch embedding and head.
    """
    return 2 * sum(_conditioning_parts(config, format, steps))


def loop_rounding_bytes(
    config: ModelConfig,
    format: str,
    latents: LatentShape,
    steps: int,
    slots: int,
    slot_bytes: int,
    arena_bytes: int,
) -> int:
    """VRAM that torch's allocator takes in the loop beyond the tensors in it, on a device of its
    own.

    Counted from what the loop holds: slots, arena, both experts' conditioning, made one after the
    other once the cache is empty, and latents; a bound for the pieces that come and go:
    `PASSING_SEGMENTS`.
    """
    held = [arena_bytes, *2 * _conditioning_tensors(config, format, steps)]
    held += (LATENTS_IN_BLOCK + LATENTS_IN_SOLVER) * [latent_bytes(latents)]
    # which the last of many slots may have opened
    last_segment = SEGMENT_BYTES if slot_bytes < LARGE_BYTES else 0
    return (
        slots * (packed_bytes(slot_bytes) - slot_bytes)
        + last_segment
        + segments_bytes(held)
        - sum(held)
        + _passing_bytes()
    )


def phase_rounding_bytes(buffers: Sequence[int]) -> int:
    """VRAM that torch's allocator takes in another phase beyond the tensors in it. buffers: sizes
    of the large ones.
    """
    return segments_bytes(buffers) - sum(buffers) + _passing_bytes()


def decode_rounding_bytes(config: ModelConfig, latents: LatentShape, tile: int) -> int:
    """The same of the VAE's phase, which makes and frees tensors of many sizes."""
    working = decode_bytes(config, latents, tile)[0] - _decoder_weight_bytes(config)
    return int(DECODE_ROUNDING_SHARE * working) + _passing_bytes()


def _passing_bytes() -> int:
    return PASSING_SEGMENTS * (SEGMENT_BYTES + SMALL_SEGMENT_BYTES)


def _conditioning_tensors(config: ModelConfig, format: str, steps: int) -> list[int]:
    """Sizes of the tensors of one expert that live through the loop: those of `Conditioning` and of
    `Ends`, in their order.
    """
    dit = config.dit
    compute, _ = element_bytes(format)
    row, values = dit.dim * FP32, dit.out_dim * PATCH_VALUES
    time = [steps * row, steps * 6 * row, *2 * [dit.text_len * dit.dim * compute]]
    return [
        *time,
        dit.dim * dit.in_dim * PATCH_VALUES * compute,
        dit.dim * compute,
        values * row,
        values * FP32,
        2 * row,
    ]


def _conditioning_parts(config: ModelConfig, format: str, steps: int) -> tuple[int, int, int]:
    """One expert's (modulation of all steps, contexts of both prompts, tensors before and after the
    blocks).
    """
    dit = config.dit
    compute, _ = element_bytes(format)
    patch = dit.dim * (dit.in_dim * PATCH_VALUES + 1) * compute
    head = (dit.dim + 1) * dit.out_dim * PATCH_VALUES * FP32 + 2 * dit.dim * FP32
    return steps * 7 * dit.dim * FP32, 2 * dit.text_len * dit.dim * compute, patch + head


def conditioning_phase_bytes(
    config: ModelConfig, format: str, steps: int, staged: bool
) -> tuple[int, int]:
    """(VRAM, RAM) while the second expert's conditioning is computed.

    One weight at a time is mapped from the file; on a device of its own (`staged`) it is copied
    there.
    """
    dit = config.dit
    compute, _ = element_bytes(format)
    weights = {
        tensor.name: tensor.nbytes for tensor in component_layout("high_noise", config, format).rest
    }
    modulation, contexts, ends = _conditioning_parts(config, format, steps)
    biases = (8 * dit.dim + 2 * dit.freq_dim) * FP32  # and the timesteps' angles
    # all of one expert, and the other's modulation
    first = 2 * modulation + contexts + ends + biases
    largest, text_weight = max(weights.values()), weights["text_embedding.0.weight"]
    time = steps * (dit.freq_dim + 3 * dit.dim) * FP32
    # Two padded branches; then both embedded, and one linear's result while its GELU is taken.
    text = 2 * dit.text_len * dit.text_dim * compute + 3 * dit.text_len * dit.dim * compute
    features = features_bytes(config, format)
    if staged:  # in the end what stays passes through the host
        passing = max(largest, conditioning_bytes(config, format, steps))
        return first + max(largest + time, text_weight + text, contexts + ends), passing + features
    return first + max(
        time, text + text_weight - largest, contexts + ends - largest
    ), largest + features


def features_bytes(config: ModelConfig, format: str) -> int:
    """RAM of both prompts' features, which stay on the host."""
    compute, _ = element_bytes(format)
    return 2 * config.dit.text_len * config.dit.text_dim * compute


def latent_bytes(latents: LatentShape) -> int:
    """One fp32 tensor of the latents' shape."""
    return math.prod(latents.shape) * FP32


def loop_host_bytes(config: ModelConfig, format: str, latents: LatentShape, staged: bool) -> int:
    """RAM of the loop beside blocks: both prompts' features and, where it is not the device's own
    memory, the state that is saved.
    """
    return features_bytes(config, format) + (_saved_state_bytes(latents) if staged else 0)


def _saved_state_bytes(latents: LatentShape) -> int:
    """The state of a run that can be resumed, as tensors and as the file's bytes."""
    return 2 * LATENTS_IN_STATE * latent_bytes(latents)


def loop_temporaries_bytes(
    config: ModelConfig, format: str, latents: LatentShape, chunk_tokens: int, references: bool
) -> int:
    """What the loop allocates for a moment beside arena, slots and latents: the largest of its
    operations.

    `references`: ops run as torch code, on fp32 copies of `REFERENCE_ROWS` rows; kernels keep
    theirs on the chip.
    """
    operations = _shared_operations(config, latents, chunk_tokens)
    if references:  # the device's memory is the host's
        operations["saved state"] = _saved_state_bytes(latents)
    if format not in QUANTIZED_FORMATS:
        operations |= _plain_operations(config, format, latents, chunk_tokens)
    elif references:
        operations |= _reference_operations(config, format, latents, chunk_tokens)
    return max(operations.values())


def _shared_operations(
    config: ModelConfig, latents: LatentShape, chunk_tokens: int
) -> dict[str, int]:
    """Operations that are torch code on every device."""
    dit = config.dit
    row = dit.dim * FP32
    smoothed = min(latents.num_tokens, SMOOTHING_TOKENS)
    return {
        "solver": LATENTS_IN_SOLVER * latent_bytes(latents),
        "patches": latents.num_tokens * PATCH_VALUES * dit.in_dim * FP32 + 3 * REFERENCE_ROWS * row,
        "head": latents.num_tokens * PATCH_VALUES * dit.out_dim * FP32 + 3 * REFERENCE_ROWS * row,
        "mean key": int(RMS_ROPE_VALUES * smoothed * row) + _angles_bytes(config, smoothed),
        "mean key of the text": 3 * dit.text_len * row,
        "angles": _angles_bytes(config, min(chunk_tokens, latents.num_tokens)) * 2,
    }


def _angles_bytes(config: ModelConfig, tokens: int) -> int:
    """cos and sin of a chunk of tokens."""
    return tokens * config.dit.head_dim * FP32


def _reference_operations(
    config: ModelConfig, format: str, latents: LatentShape, chunk_tokens: int
) -> dict[str, int]:
    """The torch references, in fp32 values per channel of the rows at work, as counted from their
    lines.
    """
    dit = config.dit
    chunk = min(chunk_tokens, latents.num_tokens)
    longest = max(chunk, dit.text_len)
    text_rows = min(REFERENCE_ROWS, longest)
    rows = min(REFERENCE_ROWS, chunk)
    smoothed = min(latents.num_tokens, SMOOTHING_TOKENS)
    row, angles = dit.dim * FP32, _angles_bytes(config, chunk)
    outputs = REFERENCE_VALUES // REFERENCE_ROWS
    heads = _slice_rows(REFERENCE_ROWS * dit.head_dim, dit.num_heads)
    head, scores = rows * dit.head_dim * FP32, rows * KEY_TILE * FP32
    quantized = 4.25 if format == "int8" else 2.0
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
    if format == "fp8":
        for name, inputs in (("ffn.0", dit.dim), ("ffn.2", dit.ffn_dim)):
            operations[f"e4m3 {name}"] = (rows * inputs + outputs * inputs + rows * outputs) * 8
    return operations


def _slice_rows(width: int, count: int) -> int:
    """Rows of `width` values that an element-wise reference works on at a time, of `count`."""
    return min(REFERENCE_ROWS, max(1, REFERENCE_VALUES // width), count)


def _plain_operations(
    config: ModelConfig, format: str, latents: LatentShape, chunk_tokens: int
) -> dict[str, int]:
    dit = config.dit
    compute, _ = element_bytes(format)
    chunk = min(chunk_tokens, latents.num_tokens)
    rows = min(PLAIN_ROWS, chunk)
    row = dit.dim * FP32
    return {
        "adaln": 2 * rows * row,
        "gelu": rows * dit.ffn_dim * compute,
        "add": rows * dit.dim * (compute + FP32 if compute != FP32 else FP32),
        "heads": int(RMS_ROPE_VALUES * min(PLAIN_ROWS, max(chunk, dit.text_len)) * row)
        + _angles_bytes(config, chunk),
        "attention": rows * dit.dim * compute,
    }


def text_bytes(config: ModelConfig, format: str, slot_bytes: int, staging: int) -> tuple[int, int]:
    """(VRAM, RAM) of the text encoder: two slots, one linear's weights in the compute dtype, and
    the activations of two prompts.
    """
    text, length = config.text_encoder, config.dit.text_len
    compute, _ = element_bytes(format)
    inner = text.num_heads * text.head_dim
    # other formats are multiplied as they are stored
    decoded = compute if format in QUANTIZED_FORMATS else 0
    x, wide, heads = (
        length * text.d_model * compute,
        length * text.d_ff * compute,
        length * inner * compute,
    )
    # both prompts' x, the new ones, and the buckets of positions
    streams = 4 * x + 2 * length * length * INT64
    # fp32 copies of the weight's rows, per input
    slices = 2 * REFERENCE_ROWS * FP32 if decoded else 0
    group = min(text.num_heads, TEXT_HEADS_AT_ONCE) * length * length
    stages = (
        # u, q, k, v and the weight in the making; then the scores of a few heads, twice in fp32
        x + 3 * heads + text.d_model * (inner * decoded + slices),
        x + 4 * heads + group * (compute + 2 * FP32 if compute != FP32 else 3 * FP32),
        x + 6 * heads + inner * (text.d_model * decoded + slices),
        # u, gate, then the weight beside fc1's result
        x + wide + text.d_model * text.d_ff * decoded + max(wide, text.d_model * slices),
        x + 2 * wide + text.d_ff * (text.d_model * decoded + slices),
        x + 3 * length * text.d_model * FP32,  # RMSNorm
    )
    rows = 2 * length * text.d_model * compute
    # handed back before the encoder's memory is taken
    tokenizer = text.vocab_size * TOKENIZER_BYTES
    return 2 * slot_bytes + streams + max(stages), max(staging * slot_bytes + rows, tokenizer)


def vae_tile_pixels(width: int, height: int) -> int:
    """The tile that a clip of this size is decoded in, 0 for none.

    It follows from the size alone, never from a budget: pixels near a tile's edge see other
    neighbours in another tiling, so a tile that shrank with the budget would change the video's
    bits.
    """
    return VAE_TILE_PIXELS if max(width, height) > VAE_TILE_PIXELS else 0


def decode_bytes(config: ModelConfig, latents: LatentShape, tile: int) -> tuple[int, int]:
    """(VRAM, RAM): the decoder's weights and one tile's working set; the frames as bytes and one
    row of tiles as floats on the host.
    """
    vae = config.vae
    stride = vae.spatial_stride
    weights = _decoder_weight_bytes(config)
    width, height = latents.width * stride, latents.height * stride
    frames = (latents.frames - 1) * vae.temporal_stride + 1
    columns, rows = min(width, tile or width), min(height, tile or height)
    cells = latents.frames * latents.channels * (columns // stride) * (rows // stride)
    # of the latent frame before, and while they are clamped
    pixels = 2 * 3 * vae.temporal_stride * rows * columns
    working = (decoder_peak_values(vae, rows // stride, columns // stride) + pixels) * FP32
    video = frames * width * height * 3
    if not tile:
        return weights + working + (cells + math.prod(latents.shape) * 2) * FP32, video
    band = (frames * 3 + 1) * rows * width * FP32
    weight_planes = 2 * rows * columns * FP32
    return weights + working + (
        2 * cells + math.prod(latents.shape) * 2
    ) * FP32, video + band + weight_planes


def _decoder_weight_bytes(config: ModelConfig) -> int:
    layout = component_layout("vae", config, "fp32")
    return sum(
        tensor.nbytes for tensor in layout.tensors if tensor.name.startswith(("decoder.", "conv2."))
    )


def decoder_peak_values(vae: VAEConfig, height: int, width: int) -> int:
    """fp32 values that the decoder holds at once for a latent frame of height x width cells, once
    its caches are full (spec 4.2).
    """
    decoder = _Decoder(height, width)
    dims = [vae.base_dim * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    decoder.convolution(vae.z_dim, dims[0])
    for _ in range(2):
        decoder.residual(dims[0], dims[0])
    last = len(vae.dim_mult) - 1
    for level, outputs in enumerate(dims[1:]):
        inputs = dims[level] // 2 if level else dims[level]
        decoder.enter(inputs)
        for _ in range(vae.num_res_blocks + 1):
            decoder.residual(inputs, outputs)
            inputs = outputs
        if level < last:
            decoder.upsample(outputs, temporal=tuple(reversed(vae.temporal_downsample))[level])
        decoder.leave()
    decoder.normalise(dims[-1])
    decoder.convolution(dims[-1], 3)
    return decoder.caches + decoder.peak


class _Decoder:
    """Walks the decoder's modules in the order that they run.

    `caches`: the last two input frames of each convolution; `peak`: the most that lives beside
    them, what callers still hold included.
    """

    def __init__(self, height: int, width: int) -> None:
        self.frames, self.height, self.width = 1, height, width
        self.caches = self.peak = 0
        # the input of the block at work, which the decoder's loop holds
        self._outer = self._entered = 0

    def _holds(self, values: int) -> None:
        self.peak = max(self.peak, self._outer + values)

    def _size(self, channels: int, frames: int | None = None) -> int:
        return channels * (self.frames if frames is None else frames) * self.height * self.width

    def enter(self, channels: int) -> None:
        self._entered = self._size(channels)

    def leave(self) -> None:
        self._outer = 0

    def convolution(self, inputs: int, outputs: int, kept: int = 0) -> None:
        """3 x 3 x 3 over the cached frames before and the new ones: joined, then padded, then
        convolved out of a copy.
        """
        new_cache = self._size(inputs, 2)
        frames, height = self.frames + 2, self.height + 2
        padded = inputs * frames * height * (self.width + 2)
        unfolded = inputs * frames * height <= UNFOLDED_BELOW_VALUES
        scratch = 27 * self._size(inputs) if unfolded else padded
        held = kept + self._size(inputs) + new_cache
        self._holds(held + self._size(inputs, frames) + padded)
        self._holds(held + padded + scratch + self._size(outputs))
        self.caches += new_cache

    def normalise(self, channels: int, kept: int = 0) -> None:
        """Input, normalised, scaled and the result."""
        self._holds(kept + 4 * self._size(channels))

    def residual(self, inputs: int, outputs: int) -> None:
        kept = self._size(inputs)
        if inputs != outputs:
            self._holds(3 * kept + self._size(outputs))
            kept += self._size(outputs)
        self.normalise(inputs, kept - self._size(inputs))
        self.convolution(inputs, outputs, kept)
        self.normalise(outputs, kept)
        self.convolution(outputs, outputs, kept)
        # from the second residual block on it is not the block's input that `kept` counts
        self._outer = self._entered

    def upsample(self, channels: int, temporal: bool) -> None:
        kept = self._size(channels)
        if temporal:
            joined, new_cache = self._size(channels, self.frames + 2), self._size(channels, 2)
            self._holds(kept + new_cache + 2 * joined)
            # unfolded or copied, and the result
            self._holds(kept + new_cache + joined + max(3 * kept, joined) + 2 * kept)
            self._holds(5 * kept)  # the result, and the result with its frames interleaved
            self.caches += new_cache
            self.frames *= 2
        copied = self._size(channels)
        self._holds(kept + 2 * copied)
        self.height, self.width = 2 * self.height, 2 * self.width
        enlarged = self._size(channels)
        self._holds(kept + copied + 2 * enlarged + self._size(channels // 2))
