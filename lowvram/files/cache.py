"""Path of the user's cache folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Path of lowvram's cache folder; its content can be deleted at any time.

    `LOWVRAM_CACHE` if set, else the platform's cache folder (XDG, `~/Library/Caches`,
    `%LOCALAPPDATA%`); a folder for temporary files where the user has no home.
    """
    override = os.environ.get("LOWVRAM_CACHE")
    if override:
        return Path(override).absolute()
    from platformdirs import user_cache_path  # not required when LOWVRAM_CACHE is set

    try:
        return user_cache_path("lowvram", appauthor=False)
    except (RuntimeError, KeyError, OSError):  # no HOME, and no entry of the user
        return Path(tempfile.gettempdir()) / f"lowvram-{os.getuid() if os.name != 'nt' else 0}"
