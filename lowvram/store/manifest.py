"""`lowvram.json`: what a store is made of, and the hash of everything in it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowvram.checkpoint.layouts.table import is_checkpoint
from lowvram.checkpoint.readers.files import read_json
from lowvram.errors import CheckpointError, IntegrityError, UsageError
from lowvram.files.io import PARTIAL, replace_file
from lowvram.formats import FORMATS
from lowvram.store.writer import JOURNAL
from lowvram.variants import COMPONENTS, T2V_A14B, ModelConfig

MANIFEST_NAME = "lowvram.json"
TOKENIZER_NAME = "tokenizer.json"
REPORT_NAME = "quantization_report.json"
STAGING_NAME = "quantize.partial"  # the folder in which a store is made
FORMAT_VERSION = 1
_LARGEST = 2**20  # of any size in a model description
_RESTORE = "quantize again or restore it"


@dataclass(frozen=True)
class ComponentManifest:
    """One file: the hash of its bytes before the data, and of each tensor's bytes in file order."""

    file: str
    header_sha256: str
    tensors: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything that `lowvram.json` says. `source`: layout and one fingerprint per component."""

    config: ModelConfig
    format: str
    recipe: dict[str, Any]
    source: dict[str, str]
    components: dict[str, ComponentManifest]
    tokenizer_sha256: str
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
    _check_sizes(data["config"], T2V_A14B.to_dict(), "config")
    config = ModelConfig.from_dict(data["config"])
    if data["format"] not in FORMATS:
        raise ValueError(f"unknown format {str(data['format'])[:40]!r}")
    if set(data["components"]) != set(COMPONENTS):
        raise ValueError(f"components are not {', '.join(COMPONENTS)}")
    components = {name: _component(name, data["components"][name]) for name in COMPONENTS}
    texts = {key: _text(data["source"][key]) for key in data["source"]}
    version = _text(data["lowvram_version"])
    return Manifest(
        config,
        data["format"],
        dict(data["recipe"]),
        texts,
        components,
        _hash(data["tokenizer_sha256"]),
        version,
    )


def _component(component: str, data: dict[str, Any]) -> ComponentManifest:
    if data["file"] != component_file(component):
        raise ValueError(f"the file of {component} is not {component_file(component)}")
    return ComponentManifest(
        data["file"],
        _hash(data["header_sha256"]),
        {name: _hash(value) for name, value in data["tensors"].items()},
    )


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{str(value)[:80]!r} is not a sha256")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:80]!r} is not a text")
    return value


def _check_sizes(value: Any, like: Any, where: str) -> None:
    """Raises `ValueError` unless `value` has the types of `like`, with sizes that arithmetic on
    them can bear.
    """
    if isinstance(like, dict):
        if not isinstance(value, dict) or set(value) != set(like):
            raise ValueError(f"{where} has other keys than {', '.join(like)}")
        for key in like:
            _check_sizes(value[key], like[key], f"{where}.{key}")
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, list) or not 1 <= len(value) <= 16:
            raise ValueError(f"{where} is not a short list")
        for item in value:
            _check_sizes(item, like[0], where)
    elif isinstance(like, float):
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{where} is not a finite number")
    elif type(value) is not type(like):
        raise ValueError(f"{where} is not of type {type(like).__name__}")
    elif type(like) is int and not 1 <= value <= (
        1024 if where.endswith("num_layers") else _LARGEST
    ):
        raise ValueError(f"{where} is outside its range")
