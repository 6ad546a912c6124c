"""All of Wan2.2 A14B on one consumer GPU, within the VRAM and RAM you name.

pipe = lowvram.load("MODEL", vram="8GiB", ram="16GiB")
pipe(prompt="a red circle moves left", seed=0).save("clip.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.api import Video, load, plan, quantize

__all__ = ["Video", "load", "plan", "quantize"]


def __getattr__(name: str) -> Any:
    """`lowvram.api` on first use: importing lowvram loads neither torch nor Triton."""
    if name in __all__:
        from lowvram import api

        return getattr(api, name)
    raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
