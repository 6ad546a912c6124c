"""Tests in Triton's interpreter run in a process of their own: Triton decides when it is imported
whether it interprets.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERPRETED = ("linear", "rows", "heads", "nan", "model")
collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = [
        str(Path(__file__).with_name(f"test_triton_{name}.py")) for name in INTERPRETED
    ]
