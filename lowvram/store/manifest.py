"""`lowvram.json`: what a store is made of, and the hash of everything in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lowvram.checkpoint.layouts.table import is_checkpoint
from lowvram.checkpoint.readers.files import read_json
from lowvram.errors import CheckpointError, IntegrityError, UsageError
from lowvram.files.checked import checked
from lowvram.files.io import PARTIAL, replace_file
from lowvram.formats import FORMATS
from lowvram.store.writer import JOURNAL
from lowvram.variants import COMPONENTS, ModelConfig

MANIFEST_NAME = "lowvram.json"
TOKENIZER_NAME = "tokenizer.json"
REPORT_NAME = "quantization_report.json"
STAGING_NAME = "quantize.partial"  # the folder in which a store is made
FORMAT_VERSION = 1
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_RESTORE = "quantize again or restore it"


@dataclass(frozen=True)
class ComponentManifest:
    """One file: the hash of its bytes before the data, and of each tensor's bytes in file order."""

    file: str
    header_sha256: Sha256
    tensors: dict[str, Sha256]


@dataclass(frozen=True)
class Manifest:
    """Everything that `lowvram.json` says. `source`: layout and one fingerprint per component."""

    config: ModelConfig
    format: str
    recipe: dict[str, Any]
    source: dict[str, str]
    components: dict[str, ComponentManifest]
    tokenizer_sha256: Sha256
    lowvram_version: str
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Replaces the manifest in `folder` in one step: it is what makes a store complete, so
        write it last.
        """
        replace_file(
            folder / MANIFEST_NAME,
            json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode(),
        )

    def to_dict(self) -> dict[str, Any]:
        data = {"variant": self.config.variant, **asdict(self)}
        return json.loads(json.dumps(data | {"sha256": _own_hash(data)}))  # type: ignore[no-any-return]


def component_file(component: str) -> str:
    return f"{component}.safetensors"


# What a store holds beside its manifest.
STORE_FILES = (
    *(component_file(component) for component in COMPONENTS),
    TOKENIZER_NAME,
    REPORT_NAME,
)


def leftovers(folder: Path) -> list[Path]:
    """What an unfinished run left in `folder`: names of lowvram alone, for a folder may hold a
    user's own `*.partial`.
    """
    files = [
        name + suffix for name in (*STORE_FILES, MANIFEST_NAME) for suffix in (PARTIAL, JOURNAL)
    ]
    found = [
        folder / name for name in files if (folder / name).is_file() or (folder / name).is_symlink()
    ]
    return [folder / STAGING_NAME, *found] if (folder / STAGING_NAME).exists() else found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in `folder`. Raises `CheckpointError`, and `IntegrityError` where
    it was changed after it was written.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise _not_a_store(folder)
    data = read_json(folder, path, advice=_RESTORE)
    if data.get("format_version") != FORMAT_VERSION:
        found = str(data.get("format_version"))[:40]
        raise CheckpointError(
            f"{path} has the format version {found}, this lowvram reads {FORMAT_VERSION}: "
            f"update lowvram or quantize again"
        )
    if data.pop("sha256", None) != _own_hash(data):
        raise IntegrityError(f"{path} was changed or damaged after it was written: {_RESTORE}")
    try:
        return _from_dict(data)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path} is not a manifest: {error}: {_RESTORE}") from error


def _not_a_store(folder: Path) -> CheckpointError:
    if leftovers(folder):
        return CheckpointError(f"{folder} is unfinished: go on with lowvram quantize --resume")
    if is_checkpoint(folder):
        return CheckpointError(
            f"{folder} is a model that is not quantized yet: make a store of it with `lowvram "
            f"quantize {folder} MODEL`"
        )
    text = f"{folder} holds no {MANIFEST_NAME}: it is not a store that lowvram quantize finished"
    return CheckpointError(
        f"{text}: give the folder of one, or make it with `lowvram quantize SOURCE MODEL`"
    )


def _own_hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _from_dict(data: dict[str, Any]) -> Manifest:
    data.pop("variant")
    manifest = checked(data, Manifest)
    if json.loads(json.dumps(asdict(manifest))) != data:
        raise ValueError("it has other keys than this version writes")
    if manifest.format not in FORMATS:
        raise ValueError(f"unknown format {manifest.format[:40]!r}")
    if set(manifest.components) != set(COMPONENTS):
        raise ValueError(f"components are not {', '.join(COMPONENTS)}")
    for component, entry in manifest.components.items():
        if entry.file != component_file(component):
            raise ValueError(f"the file of {component} is not {component_file(component)}")
    return manifest
