"""`lowvram inspect`: describe a file, a checkpoint or a store, and verify a store's hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lowvram.checkpoint.dialects.table import dialect_of
from lowvram.checkpoint.layouts.official import FOLDERS, STEMS, looks_official
from lowvram.checkpoint.layouts.table import model_folder
from lowvram.checkpoint.readers.files import links_allowed
from lowvram.checkpoint.readers.safetensors_header import Header, TensorInfo, quoted, read_header
from lowvram.checkpoint.readers.shards import RawTensors, named, open_folder, open_one
from lowvram.checkpoint.source import Source, open_source
from lowvram.errors import CheckpointError, IntegrityError, UsageError
from lowvram.lora.changes import kind_of
from lowvram.lora.keys import targets
from lowvram.store.manifest import MANIFEST_NAME
from lowvram.store.reader import Store, StoreFile, open_store
from lowvram.variants import T2V_A14B

OnBytes = Callable[[int, int], None]  # (bytes done, bytes in all)
READ_BYTES = 8 * 2**20
# Tensors that only one component has, by official, diffusers or transformers name.
_COMPONENTS = {
    "expert": r"(^|\.)(patch_embedding\.weight|head\.modulation)$|attn1\.to_q\.weight$",
    "text_encoder": r"token_embedding\.weight$|(^|\.)shared\.weight$|wi_0\.weight$",
    "vae": r"decoder\.(conv1|conv_in)\.weight$",
    "lora": r"lora_(down|up|A|B)\b",
}


def inspect_path(
    path: Path, verify: bool, progress: OnBytes | None = None, allow_links: bool = False
) -> dict[str, Any]:
    """Describes a safetensors file, a source folder or a store, as data for JSON.

    verify: also read all data of a store and check them with `verify_store`.
    progress: called with (done_bytes, total_bytes) during verification; allow_links: follow links
    that point out of the folder.
    Raises `CheckpointError`, and `UsageError` for `verify` on anything but a store.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a .safetensors file, a checkpoint folder or a "
            f"quantized model"
        )
    path = model_folder(path)
    if (path / MANIFEST_NAME).exists():
        # A failed sample check would prevent the complete list of differences.
        with open_store(path, not verify, allow_links) as store:
            if verify:
                verify_store(store, progress)
            return _describe_store(store, verify)
    if verify:
        raise UsageError(
            f"{path} is not a quantized store and has no hashes to verify: leave out --verify"
        )
    if path.is_dir():
        with links_allowed(allow_links):
            return _describe_folder(path, allow_links)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise CheckpointError(f"{path} is a pickle, which inspect does not open: give its folder")
    return _describe_file(read_header(path))


def verify_store(store: Store, progress: OnBytes | None = None) -> None:
    """Compare every header and tensor with its hash in the manifest; scales must be finite.

    Raises `IntegrityError` that lists all differences.
    """
    total = sum(file.header.file_bytes for file in store.files.values())
    done, damaged = 0, []
    for component, file in store.files.items():
        record = store.manifest.components[component]
        if _hash_range(file, 0, file.header.data_start) != record.header_sha256:
            damaged.append(f"{component} header")
        done += file.header.data_start
        for name, info in file.header.tensors.items():
            if _hash_range(file, info.start, info.end) != record.tensors[name]:
                damaged.append(f"{component} {name}")
            elif name.endswith("_scale") and not bool(torch.isfinite(file.read(name)).all()):
                damaged.append(f"{component} {name} (not finite)")
            done += info.nbytes
            if progress:
                progress(done, total)
    if damaged:
        raise IntegrityError(
            f"{store.path}: {len(damaged)} parts differ from the manifest: {named(damaged)}: "
            f"quantize again or restore it"
        )


def _hash_range(file: StoreFile, start: int, end: int) -> str:
    digest = hashlib.sha256()
    try:
        with open(file.path, "rb") as data:
            data.seek(start)
            while start < end and (chunk := data.read(min(READ_BYTES, end - start))):
                digest.update(chunk)
                start += len(chunk)
    except OSError as error:
        raise IntegrityError(
            f"{file.path} cannot be read at byte {start}: {error.strerror or error}"
        ) from error
    return digest.hexdigest()


def _describe_store(store: Store, verified: bool) -> dict[str, Any]:
    manifest = store.manifest
    components = {
        name: _contents(file.header.tensors.values())
        | {"file": file.path.name, "file_bytes": file.header.file_bytes, "blocks": len(file.blocks)}
        | {"block_bytes": file.blocks[0].nbytes if file.blocks else 0}
        for name, file in store.files.items()
    }
    about = {
        "kind": "store",
        "path": str(store.path),
        "format": store.format,
        "verified": verified,
        "config": store.config.to_dict(),
    }
    made = {
        "lowvram_version": manifest.lowvram_version,
        "recipe": manifest.recipe,
        "source": manifest.source,
    }
    return (
        about
        | made
        | {
            "components": components,
            "total_bytes": sum(file.header.file_bytes for file in store.files.values()),
        }
    )


def _describe_folder(path: Path, allow_links: bool) -> dict[str, Any]:
    if looks_official(path) and any(_only_pickled(path, stem) for stem in STEMS.values()):
        return _describe_pickled(path)
    with open_source(path, allow_links=allow_links) as source:
        return _describe_source(source)


def _describe_source(source: Source) -> dict[str, Any]:
    components = {
        name: _contents(component.tensors.values())
        | {"files": [str(file.relative_to(source.path)) for file in component.raw.files]}
        for name, component in source.components.items()
    }
    about = {
        "kind": "source",
        "path": str(source.path),
        "layout": source.layout,
        "config": source.config.to_dict(),
    }
    return about | {
        "components": components,
        "total_bytes": sum(item["bytes"] for item in components.values()),
    }


def _describe_pickled(path: Path) -> dict[str, Any]:
    """Describe an official folder that contains pickles; they are listed but not opened."""
    components: dict[str, Any] = {}
    for name, folder in FOLDERS.items():
        components[name] = _describe_raw(path, open_folder(path, path / folder))
    for name, stem in STEMS.items():
        if _only_pickled(path, stem):
            pickled = path / f"{stem}.pth"
            components[name] = {
                "files": [pickled.name],
                "bytes": pickled.stat().st_size,
                "note": "a pickle, not opened",
            }
        else:
            components[name] = _describe_raw(path, open_one(path, stem, allow_pickle=False))
    about = {"kind": "source", "path": str(path), "layout": "official", "config": None}
    return about | {
        "components": components,
        "total_bytes": sum(item["bytes"] for item in components.values()),
    }


def _only_pickled(path: Path, stem: str) -> bool:
    return (path / f"{stem}.pth").exists() and not (path / f"{stem}.safetensors").exists()


def _describe_raw(path: Path, raw: RawTensors) -> dict[str, Any]:
    return _contents(raw.infos.values()) | {
        "files": [str(file.relative_to(path)) for file in raw.files]
    }


def _describe_file(header: Header) -> dict[str, Any]:
    names = list(header.tensors)
    found = [
        component
        for component, pattern in _COMPONENTS.items()
        if any(re.search(pattern, name) for name in names)
    ]
    about: dict[str, Any] = {
        "kind": "safetensors",
        "path": str(header.path),
        "file_bytes": header.file_bytes,
    }
    about |= {
        "header_bytes": header.data_start,
        "component": "lora" if "lora" in found else (found[0] if len(found) == 1 else "unknown"),
    }
    if about["component"] == "lora":
        about["lora"] = _describe_lora(header)
    about |= {
        "dialect": dialect_of(header.tensors, header.metadata).name,
        "metadata": {key: value[:1000] for key, value in header.metadata.items()},
    }
    return about | _contents(header.tensors.values())


def _describe_lora(header: Header) -> dict[str, Any]:
    """What a LoRA changes in an expert of T2V-A14B, and which of its keys are of nothing there."""
    found, unknown = targets(header.tensors, T2V_A14B.dit)
    ranks = {
        header.tensors[keys["down"]].shape[0]
        for keys in found.values()
        if "down" in keys and header.tensors[keys["down"]].shape
    }
    return {
        "tensors_changed": len(found),
        "kinds": sorted({kind_of(tuple(keys)) or "incomplete" for keys in found.values()}),
        "ranks": sorted(ranks),
        "unknown_keys": len(unknown),
        "unknown": [quoted(name) for name in unknown[:6]],
    }


def _contents(tensors: Iterable[TensorInfo]) -> dict[str, Any]:
    """Number and bytes of tensors, in total and per dtype."""
    dtypes: dict[str, dict[str, int]] = {}
    for info in tensors:
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    counts = list(dtypes.values())
    return {
        "tensors": sum(item["tensors"] for item in counts),
        "bytes": sum(item["bytes"] for item in counts),
        "dtypes": dtypes,
    }
