"""Path of the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Path of lowvram's cache folder; its content can be deleted at any time.

    `LOWVRAM_CACHE` if set, else the platform's cache folder (XDG, `~/Library/Caches`,
    `%LOCALAPPDATA%`).
    """
    override = os.environ.get("LOWVRAM_CACHE")
    if override:
        return Path(override).absolute()
    from platformdirs import user_cache_path  # not required when LOWVRAM_CACHE is set

    return user_cache_path("lowvram", appauthor=False)
