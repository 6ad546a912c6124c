"""Ways of storing and multiplying the experts' weights."""

from __future__ import annotations

FORMATS = ("int8", "int8-plain", "fp8", "bf16", "fp32")
