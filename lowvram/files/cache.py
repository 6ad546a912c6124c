"""The user's cache folder."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Where lowvram keeps what it can make again, by the platform's rules: XDG, `~/Library/Caches`,
    `%LOCALAPPDATA%`.
    """
    return user_cache_path("lowvram", appauthor=False)
