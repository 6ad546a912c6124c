"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where lowvram keeps what it can make again: `LOWVRAM_CACHE`, else the platform's cache folder
    (XDG, `~/Library/Caches`, `%LOCALAPPDATA%`).
    """
    named = os.environ.get("LOWVRAM_CACHE")
    if named:
        return Path(named).absolute()
    from platformdirs import user_cache_path  # where it is named, nothing has to be installed

    return user_cache_path("lowvram", appauthor=False)
