"""Prompts' features on disk, by the hash of everything they follow from, so that a repeated prompt
loads no text encoder.
"""

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
from lowvram.files.io import PARTIAL, replacing, write_all
from lowvram.variants import TextEncoderConfig

FORMAT_VERSION = 1
LIMIT_BYTES = 256 * 10**6
HEADER_BYTES = 4096  # a file of ours has less than this around its tensor
LEFTOVER_S = 3600.0  # an unfinished file of this age belongs to a process that died
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_log = logging.getLogger(__name__)


def features_key(
    tensor_hashes: Mapping[str, str],
    config: TextEncoderConfig,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """sha256 over what features follow from: weights, dimensions, token ids, dtype, and what
    computes them, since devices round apart.
    """
    computes = (
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
        "device": computes,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class PromptCache:
    """One safetensors file per prompt in `folder`, at most `limit_bytes` in all; the one unused for
    longest goes first.

    Never a reason for a run to fail: what cannot be read or is damaged is not there, what cannot be
    written is not kept.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        """folder: the user's cache folder by default."""
        self.folder = folder or cache_folder() / "prompts"
        self.limit_bytes = limit_bytes

    def load(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The features [L, d_model] kept under `key`; None where there are none of this shape and
        dtype with their own hash.
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
                # in memory of torch, where all that a run holds is counted
                features = file.read("features", mapped=False).clone()
        except (CheckpointError, OSError) as error:
            _log.info("%s is not read: %s", path, error)
            return None
        if (tuple(features.shape), features.dtype) != (shape, dtype) or metadata != _metadata(
            key, features
        ):
            _log.info("%s is damaged or not lowvram's: the prompt is encoded again", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return features

    def save(self, key: str, features: Tensor) -> None:
        """Keeps [L, d_model] under `key`, in place of what is there; other processes see the old
        file or the whole new one.
        """
        content = save({"features": features.contiguous()}, _metadata(key, features))
        if len(content) > self.limit_bytes:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A name of its own: several processes may encode the same prompt.
            descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, dir=self.folder)
            with replacing(self._path(key), Path(partial), durable=False):
                try:
                    write_all(descriptor, content)
                finally:
                    os.close(descriptor)
            self._make_room()
        except (OSError, OutputError) as error:
            _log.info("the prompt's features are not kept in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        """Removes what was used longest ago until the rest fits, and what processes that died left
        behind.
        """
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may have removed it meanwhile
                found = path.stat()
                if _NAME.fullmatch(path.name):
                    kept.append((found.st_mtime, found.st_size, path))
                elif path.suffix == PARTIAL and time.time() - found.st_mtime > LEFTOVER_S:
                    path.unlink()
        used = sum(nbytes for _, nbytes, _ in kept)
        for _, nbytes, path in sorted(kept):
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
