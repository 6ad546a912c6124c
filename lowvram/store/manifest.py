"""The manifest of a store, `lowvram.json`: its configuration and the hashes of all its files."""

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
from lowvram.files.write import PARTIAL, replace_file
from lowvram.formats import FORMATS
from lowvram.store.writer import JOURNAL
from lowvram.variants import COMPONENTS, ModelConfig

MANIFEST_NAME = "lowvram.json"
TOKENIZER_NAME = "tokenizer.json"
REPORT_NAME = "quantization_report.json"
STAGING_NAME = "quantize.partial"  # subfolder in which a store is built
FORMAT_VERSION = 1
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_RESTORE = "quantize again or restore it"


@dataclass(frozen=True)
class ComponentManifest:
    """The file of one component.

    header_sha256: hash of the bytes before the tensor data; tensors: hash of each tensor's bytes,
    in file order.
    """

    file: str
    header_sha256: Sha256
    tensors: dict[str, Sha256]


@dataclass(frozen=True)
class Manifest:
    """Contents of `lowvram.json`.

    source: layout and one fingerprint per component; recipe: how the tensors were quantized.
    """

    config: ModelConfig
    format: str
    recipe: dict[str, Any]
    source: dict[str, str]
    components: dict[str, ComponentManifest]
    tokenizer_sha256: Sha256
    lowvram_version: str
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the manifest atomically, as the last file: it marks the store as complete.

        Raises `OutputError`.
        """
        replace_file(
            folder / MANIFEST_NAME,
            json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON values, with its own hash under `sha256`."""
        data = {"variant": self.config.variant, **asdict(self)}
        return json.loads(json.dumps(data | {"sha256": _own_hash(data)}))  # type: ignore[no-any-return]


def component_file(component: str) -> str:
    """File name of a component in a store."""
    return f"{component}.safetensors"


# Files of a store besides the manifest.
STORE_FILES = (
    *(component_file(component) for component in COMPONENTS),
    TOKENIZER_NAME,
    REPORT_NAME,
)


def leftovers(folder: Path) -> list[Path]:
    """Files of an unfinished run in `folder`.

    Only names that lowvram writes: any other `*.partial` belongs to the user.
    """
    files = [
        name + suffix for name in (*STORE_FILES, MANIFEST_NAME) for suffix in (PARTIAL, JOURNAL)
    ]
    existing = [
        folder / name for name in files if (folder / name).is_file() or (folder / name).is_symlink()
    ]
    return [folder / STAGING_NAME, *existing] if (folder / STAGING_NAME).exists() else existing


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the store in `folder`.

    Raises `CheckpointError` if there is none or it is invalid, and `IntegrityError` if it was
    changed after it was written.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise _not_a_store(folder)
    data = read_json(folder, path, advice=_RESTORE)
    if data.get("format_version") != FORMAT_VERSION:
        version = str(data.get("format_version"))[:40]
        raise CheckpointError(
            f"{path} has format version {version}, this lowvram reads {FORMAT_VERSION}: "
            f"update lowvram or quantize again"
        )
    if data.pop("sha256", None) != _own_hash(data):
        raise IntegrityError(f"{path} was changed or damaged after it was written: {_RESTORE}")
    try:
        return _from_dict(data)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path} is not a manifest: {error}: {_RESTORE}") from error


def _not_a_store(folder: Path) -> CheckpointError:
    """The error for a folder without a manifest."""
    if leftovers(folder):
        return CheckpointError(f"{folder} is unfinished: continue with lowvram quantize --resume")
    if is_checkpoint(folder):
        return CheckpointError(
            f"{folder} is a model that is not quantized yet: quantize it with `lowvram "
            f"quantize {folder} MODEL`"
        )
    text = f"{folder} contains no {MANIFEST_NAME}, so it is not a complete quantized model"
    return CheckpointError(
        f"{text}: give the folder of one, or create one with `lowvram quantize SOURCE MODEL`"
    )


def _own_hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _from_dict(data: dict[str, Any]) -> Manifest:
    """The manifest from JSON values without their hash. Raises `ValueError` or `KeyError`."""
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
