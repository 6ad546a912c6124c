"""The recipe of a run (format and quantizer version), and the identity that a resumed run needs."""

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

QUANTIZER_VERSION = 1  # increased when the same source and format give other bytes
ROW_FORMATS: dict[str, RowFormat] = {"int8": INT8, "int8-plain": INT8_PLAIN, "fp8": FP8}


@dataclass(frozen=True)
class Recipe:
    """What determines the bytes of a store besides its source.

    format: of the experts' block linears, a key of `lowvram.formats.FORMATS`;
    `store.layout.component_format` derives the formats of the other components. Raises `UsageError`
    for an unknown format.
    """

    format: str = "int8"
    quantizer_version: int = QUANTIZER_VERSION

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}: use one of {', '.join(FORMATS)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as stored in the manifest and the report."""
        return asdict(self)


def lowvram_version() -> str:
    """Return the installed version of lowvram, or "not installed" in a bare source tree."""
    try:
        return metadata.version("lowvram")
    except metadata.PackageNotFoundError:
        return "not installed"


def source_record(source: Source) -> dict[str, str]:
    """Return the layout, one fingerprint per component and the LoRAs merged into each, as stored in
    the manifest.
    """
    loras = {
        f"{name} loras": "; ".join(component.merged)
        for name, component in source.components.items()
        if component.merged
    }
    fingerprints = {name: item.fingerprint() for name, item in source.components.items()}
    return {"layout": source.layout} | fingerprints | loras


def run_identity(recipe: Recipe, source: Source) -> dict[str, str]:
    """Return everything that the bytes of the store depend on, as name -> value."""
    return _identity(
        recipe.to_dict(),
        source_record(source),
        source.config,
        _sha256(source.tokenizer),
        lowvram_version(),
    )


def manifest_identity(manifest: Manifest) -> dict[str, str]:
    """Return the identity of the run that wrote a finished store, as `run_identity`."""
    return _identity(
        manifest.recipe,
        manifest.source,
        manifest.config,
        manifest.tokenizer_sha256,
        manifest.lowvram_version,
    )


def check_same(found: dict[str, str], wanted: dict[str, str], where: str) -> None:
    """Raise `ResumeError` if the identities of the interrupted run and this one differ.

    The message gives both values of each difference. where: the folder of the interrupted run.
    """
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        texts = "; ".join(f"{key} was {found.get(key)}, now {wanted.get(key)}" for key in different)
        raise ResumeError(
            f"cannot continue the run in {where}: {texts}: use the same options and source, "
            f"or start again without --resume"
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
