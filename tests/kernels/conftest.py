"""Collects the tests of Triton's interpreter only if TRITON_INTERPRET=1 is set.

Triton decides on import whether it interprets, so these tests need a separate process.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERPRETED = (
    "adaln_quantize",
    "attention_int8",
    "model",
    "nan",
    "quantize_rows",
    "quantize_values",
    "quantized_linear",
    "rms_rope_quantize",
)
collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = [
        str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in INTERPRETED
    ]
