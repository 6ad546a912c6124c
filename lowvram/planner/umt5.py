"""Memory that the UMT5 encoder and the tokenizer allocate."""

from __future__ import annotations

from lowvram_kernels.sizes import REFERENCE_ROWS

from lowvram.request import Workload

# Heads whose attention weights are computed at a time; independent of the budgets.
HEADS_AT_ONCE = 8
# RAM of the `tokenizers` library per piece of the vocabulary: 2.3 kB measured.
TOKENIZER_BYTES = 2560
# Of the process that it runs in, without a tokenizer: 28 MB measured.
TOKENIZER_PROCESS_BYTES = 40 * 10**6
FP32 = 4
INT64 = 8


def text_bytes(workload: Workload, slot_bytes: int, staging: int) -> tuple[int, int]:
    """(VRAM, RAM) in bytes of the text encoder's phase.

    VRAM: two slots of `slot_bytes`, one linear's weights in the compute dtype and the activations
    of two prompts. RAM: `staging` buffers of `slot_bytes` and the features, or the process of
    the tokenizer if larger.
    """
    text, length = workload.config.text_encoder, workload.config.dit.text_len
    compute = workload.format.outside_bytes
    inner = text.num_heads * text.head_dim
    # other formats are multiplied as they are stored
    decoded = compute if workload.format.quantized else 0
    x, wide, heads = (
        length * text.d_model * compute,
        length * text.d_ff * compute,
        length * inner * compute,
    )
    # x of both prompts before a block and of one after it, and the position buckets
    streams = 3 * x + 2 * length * length * INT64
    # fp32 copies of the weight's rows, per input
    slices = 2 * REFERENCE_ROWS * FP32 if decoded else 0
    group = min(text.num_heads, HEADS_AT_ONCE) * length * length
    stages = (
        # u, q, k, v and the weight being dequantized; then the scores of a few heads, twice in fp32
        x + 3 * heads + text.d_model * (inner * decoded + slices),
        x + 4 * heads + group * ((compute if compute != FP32 else 0) + 2 * FP32),
        x + 6 * heads + inner * (text.d_model * decoded + slices),
        # x after attention, u, gate, then the weight and the result of fc1
        2 * x + wide + text.d_model * text.d_ff * decoded + max(wide, text.d_model * slices),
        2 * x + 2 * wide + text.d_ff * (text.d_model * decoded + slices),
        2 * x + 3 * length * text.d_model * FP32,  # RMSNorm
    )
    rows = 2 * length * text.d_model * compute
    # freed before the encoder's buffers are allocated
    tokenizer = text.vocab_size * TOKENIZER_BYTES + TOKENIZER_PROCESS_BYTES
    return 2 * slot_bytes + streams + max(stages), max(staging * slot_bytes + rows, tokenizer)
