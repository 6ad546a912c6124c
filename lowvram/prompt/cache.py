"""Disk cache of encoded prompts, so that a repeated prompt does not load the text encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.errors import CheckpointError, OutputError
from lowvram.files.cache import cache_folder
from lowvram.files.write import PARTIAL, replacing, write_all
from lowvram.variants import TextEncoderConfig

FORMAT_VERSION = 1
LIMIT_BYTES = 256 * 10**6
HEADER_BYTES = 4096  # upper bound of the safetensors header of a cached file
LEFTOVER_S = 3600.0  # a partial file older than this was left by a process that died
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_log = logging.getLogger(__name__)


def features_key(
    tensor_hashes: Mapping[str, str],
    config: TextEncoderConfig,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The cache key: sha256 (hex) of everything that determines the bits of the features.

    tensor_hashes: sha256 of every tensor of the text encoder, by name. The device counts, because
    devices round differently.
    """
    processor = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    content = {
        "version": FORMAT_VERSION,
        "text_encoder": dict(tensor_hashes),
        "config": asdict(config),
        "token_ids": list(token_ids),
        "dtype": str(dtype),
        "device": processor,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class PromptCache:
    """A folder with one safetensors file per prompt. Beyond `limit_bytes` in total, the least
    recently used files are removed.

    I/O errors never fail a run: an unreadable or damaged file is a cache miss, and features that
    cannot be written are not cached.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        """folder: default `prompts` in the user's cache folder; limit_bytes: size of all files."""
        self.folder = folder or cache_folder() / "prompts"
        self.limit_bytes = limit_bytes

    def load(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The cached features [L, d_model] of `key`, on the CPU.

        shape: (L, d_model). None on a miss: no readable file with this shape, dtype and a matching
        hash.
        """
        path = self._path(key)
        try:
            if (
                not path.is_file()
                or path.stat().st_size > shape[0] * shape[1] * dtype.itemsize + HEADER_BYTES
            ):
                return None
            with TensorFile(path) as file:
                metadata = file.header.metadata
                features = file.read("features")
        except (CheckpointError, OSError) as error:
            _log.info("cannot read %s: %s", path, error)
            return None
        if (tuple(features.shape), features.dtype) != (shape, dtype) or metadata != _metadata(
            key, features
        ):
            _log.info("%s is damaged or of another program: encoding the prompt again", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return features

    def save(self, key: str, features: Tensor) -> None:
        """Cache features [L, d_model] under `key`, replacing an existing file atomically.

        Features larger than `limit_bytes` are not cached.
        """
        content = save({"features": features.contiguous()}, _metadata(key, features))
        if len(content) > self.limit_bytes:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A unique name, because several processes may encode the same prompt.
            descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, dir=self.folder)
            with replacing(self._path(key), Path(partial), durable=False, made=True):
                try:
                    write_all(descriptor, content)
                finally:
                    os.close(descriptor)
            self._make_room()
        except (OSError, OutputError) as error:
            _log.info("cannot cache the prompt's features in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        """Remove the least recently used files beyond the limit, and old partial files."""
        cached: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may have removed it meanwhile
                status = path.stat()
                if _NAME.fullmatch(path.name):
                    cached.append((status.st_mtime, status.st_size, path))
                elif path.suffix == PARTIAL and time.time() - status.st_mtime > LEFTOVER_S:
                    path.unlink()
        used = sum(nbytes for _, nbytes, _ in cached)
        for _, nbytes, path in sorted(cached):
            if used <= self.limit_bytes:
                break
            with suppress(OSError):
                path.unlink()
                used -= nbytes


def _metadata(key: str, features: Tensor) -> dict[str, str]:
    content = features.contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "lowvram_prompt": str(FORMAT_VERSION),
        "key": key,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
