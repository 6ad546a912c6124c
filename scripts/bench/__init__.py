"""Benchmarks; `python -m scripts.bench --help` from the root of the repository."""

import sys
from pathlib import Path

# A machine for measuring may have nothing of lowvram installed.
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "quantize")]
