"""What a run makes of its source: the format, the rules behind its bytes, and the identity that a
resumed run must share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from lowvram.checkpoint.source import Source
from lowvram.errors import ResumeError, UsageError
from lowvram.formats import FORMATS
from lowvram.store.manifest import Manifest
from lowvram.variants import ModelConfig
from lowvram_quantize.fp8 import FP8
from lowvram_quantize.int8 import INT8, INT8_PLAIN
from lowvram_quantize.rows import RowFormat

QUANTIZER_VERSION = 1  # counts up when the same source and format would give other bytes
ROW_FORMATS: dict[str, RowFormat] = {"int8": INT8, "int8-plain": INT8_PLAIN, "fp8": FP8}


@dataclass(frozen=True)
class Recipe:
    """The format of the experts' block linears; `store.layout.component_format` derives that of the
    other components.
    """

    format: str = "int8"
    quantizer_version: int = QUANTIZER_VERSION

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}: use one of {', '.join(FORMATS)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lowvram_version() -> str:
    try:
        return metadata.version("lowvram")
    except metadata.PackageNotFoundError:
        return "not installed"


def source_record(source: Source) -> dict[str, str]:
    """Layout and one fingerprint per component, as the manifest keeps them."""
    return {"layout": source.layout} | {
        name: component.fingerprint() for name, component in source.components.items()
    }


def run_identity(recipe: Recipe, source: Source) -> dict[str, str]:
    """All that the bytes of the store depend on."""
    return _identity(
        recipe.to_dict(),
        source_record(source),
        source.config,
        _sha256(source.tokenizer),
        lowvram_version(),
    )


def manifest_identity(manifest: Manifest) -> dict[str, str]:
    """The identity of the run that made a finished store."""
    return _identity(
        manifest.recipe,
        manifest.source,
        manifest.config,
        manifest.tokenizer_sha256,
        manifest.lowvram_version,
    )


def check_same(found: dict[str, str], wanted: dict[str, str], where: str) -> None:
    """Raises `ResumeError` with both values of everything that differs between an interrupted run
    and this one.
    """
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        texts = "; ".join(f"{key} was {found.get(key)}, now {wanted.get(key)}" for key in different)
        raise ResumeError(
            f"cannot continue the run in {where}: {texts}: repeat the old request, or start "
            f"again without --resume"
        )


def _identity(
    recipe: dict[str, Any],
    source: dict[str, str],
    config: ModelConfig,
    tokenizer: str,
    version: str,
) -> dict[str, str]:
    return {
        "lowvram_version": version,
        **{key: str(value) for key, value in recipe.items()},
        **{f"source {key}": value for key, value in source.items()},
        "source tokenizer": tokenizer,
        "source config": _sha256(json.dumps(config.to_dict(), sort_keys=True).encode()),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
