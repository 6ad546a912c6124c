"""Code that the checkpoint layouts share: their common result, and reading of settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from lowvram.checkpoint.readers.files import Settings, read_bytes, read_json
from lowvram.checkpoint.readers.shards import RawTensors
from lowvram.errors import CheckpointError, UsageError
from lowvram.request import Request
from lowvram.variants import (
    T2V_A14B,
    DiTConfig,
    ModelConfig,
    SamplingDefaults,
    TextEncoderConfig,
    VAEConfig,
)

Rename = Callable[[str], "str | None"]
DEFAULTS_FILE = "lowvram_defaults.json"
CONFIG_CAP_BYTES = 2**20


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


def read_settings(root: Path, path: Path) -> Settings:
    """Read a config file of the model folder `root`. Raises `CheckpointError`."""
    return Settings(path, read_json(root, path, CONFIG_CAP_BYTES))


def read_tokenizer(root: Path, path: Path) -> bytes:
    """Read `tokenizer.json` as bytes, after checking that it is JSON. Raises `CheckpointError`."""
    read_json(root, path)
    return read_bytes(root, path)


def read_sampling(root: Path) -> SamplingDefaults:
    """The official sampling defaults, overridden by `lowvram_defaults.json` in the model folder.

    Raises `CheckpointError`, naming file and field, when no valid request has these defaults.
    """
    path = root / DEFAULTS_FILE
    if not path.exists():
        return SamplingDefaults()
    settings = Settings(path, read_json(root, path, CONFIG_CAP_BYTES, "correct it or remove it"))
    known = {item.name: item.type for item in fields(SamplingDefaults) if item.name != "boundary"}
    unknown = [key for key in settings.data if key not in known]
    if unknown:
        raise CheckpointError(
            f"{path}: unknown key {unknown[0][:80]!r}; known are {', '.join(known)}; correct "
            f"it or remove it"
        )
    changes = {
        key: settings.integer(key) if known[key] == "int" else settings.number(key)
        for key in settings.data
    }
    defaults = replace(SamplingDefaults(), **changes)  # type: ignore[arg-type]  # each key has its own field's type
    try:
        Request(prompt="", **asdict(defaults))
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}; correct it or remove it") from error
    return defaults


def make_dit_config(path: Path, make: Callable[[], DiTConfig]) -> DiTConfig:
    """Return `make()`; a `UsageError` becomes a `CheckpointError` that names the file `path`."""
    try:
        return make()
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def model_config(
    dit: DiTConfig, text: TextEncoderConfig, vae: VAEConfig, sampling: SamplingDefaults
) -> ModelConfig:
    """The config of the whole model; its variant is `t2v-custom` if any dimension is not A14B's."""
    is_a14b = (dit, text, vae) == (T2V_A14B.dit, T2V_A14B.text_encoder, T2V_A14B.vae)
    return ModelConfig(T2V_A14B.variant if is_a14b else "t2v-custom", dit, text, vae, sampling)
