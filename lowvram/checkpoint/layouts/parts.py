"""Code that the checkpoint layouts share: their common result, and reading of settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import msgspec

from lowvram.checkpoint.readers.files import read_bytes, read_json
from lowvram.checkpoint.readers.shards import RawTensors
from lowvram.errors import CheckpointError, UsageError
from lowvram.files.checked import checked
from lowvram.files.limits import CONFIG_BYTES, TOKENIZER_FILE_BYTES
from lowvram.request import Request
from lowvram.variants import (
    DiTConfig,
    ModelConfig,
    SamplingDefaults,
    TextEncoderConfig,
    VAEConfig,
    variant_of,
)

Rename = Callable[[str], "str | None"]
DEFAULTS_FILE = "lowvram_defaults.json"


@dataclass
class Parts:
    """An opened checkpoint whose tensors are not yet validated against its config.

    layout: name of the layout; raw and renames: tensors under their stored names, and the map to
    official names, per component; tokenizer: the bytes of `tokenizer.json`.
    """

    layout: str
    config: ModelConfig
    raw: dict[str, RawTensors]
    renames: dict[str, Rename]
    tokenizer: bytes


def read_tokenizer(root: Path, path: Path) -> bytes:
    """Read `tokenizer.json` as bytes, after checking that it is JSON. Raises `CheckpointError`."""
    content = read_bytes(root, path, TOKENIZER_FILE_BYTES)
    try:
        # checks the values without making objects of them
        msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}: download it again") from error
    return content


def read_sampling(root: Path, defaults: SamplingDefaults) -> SamplingDefaults:
    """A variant's sampling defaults, overridden by `lowvram_defaults.json` in the model folder.

    Raises `CheckpointError`, naming file and field, when no valid request has these defaults.
    """
    path = root / DEFAULTS_FILE
    if not os.path.lexists(path):  # a broken link is an error
        return defaults
    advice = "correct it or remove it"
    data = read_json(root, path, CONFIG_BYTES, advice)
    known = {item.name for item in fields(SamplingDefaults)} - {"boundary"}
    try:
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0][:80]!r}; known are {', '.join(sorted(known))}"
            )
        changed = checked(asdict(defaults) | data, SamplingDefaults)
        Request(prompt="", **asdict(changed))
    except (ValueError, UsageError) as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from error
    return changed


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn a `UsageError` about the dimensions in a file into a `CheckpointError` naming it."""
    try:
        yield
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def require_norms(qk_norm: bool, cross_attn_norm: bool) -> None:
    """Raises `ValueError` for a model without the norms that all of Wan2.2 has."""
    if not (qk_norm and cross_attn_norm):
        raise ValueError(
            f"qk_norm is {qk_norm} and cross_attn_norm is {cross_attn_norm}, expected true: all "
            f"that this version reads"
        )


def model_config(
    root: Path, dit: DiTConfig, text: TextEncoderConfig, vae: VAEConfig
) -> ModelConfig:
    """The config of a model in the folder `root`, with the name and the sampling defaults of the
    variant that it is; a model with other dimensions is `t2v-custom`.
    """
    variant = variant_of(dit, text, vae)
    name = variant.config.variant if variant else "t2v-custom"
    defaults = variant.config.sampling if variant else SamplingDefaults()
    return ModelConfig(name, dit, text, vae, read_sampling(root, defaults))
