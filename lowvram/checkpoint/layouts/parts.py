"""Code that the checkpoint layouts share: their common result, and reading of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lowvram.checkpoint.readers.files import CONFIG_CAP_BYTES, read_bytes, read_json
from lowvram.checkpoint.readers.shards import RawTensors
from lowvram.errors import CheckpointError, UsageError
from lowvram.files.checked import checked
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
    read_json(root, path)
    return read_bytes(root, path)


def read_sampling(root: Path) -> SamplingDefaults:
    """The official sampling defaults, overridden by `lowvram_defaults.json` in the model folder.

    Raises `CheckpointError`, naming file and field, when no valid request has these defaults.
    """
    path = root / DEFAULTS_FILE
    if not path.exists():
        return SamplingDefaults()
    advice = "correct it or remove it"
    data = read_json(root, path, CONFIG_CAP_BYTES, advice)
    known = {item.name for item in fields(SamplingDefaults)} - {"boundary"}
    try:
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0][:80]!r}; known are {', '.join(sorted(known))}"
            )
        defaults = checked(asdict(SamplingDefaults()) | data, SamplingDefaults)
        Request(prompt="", **asdict(defaults))
    except (ValueError, UsageError) as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from error
    return defaults


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
    dit: DiTConfig, text: TextEncoderConfig, vae: VAEConfig, sampling: SamplingDefaults
) -> ModelConfig:
    """The config of the whole model; its variant is `t2v-custom` if any dimension is not A14B's."""
    is_a14b = (dit, text, vae) == (T2V_A14B.dit, T2V_A14B.text_encoder, T2V_A14B.vae)
    return ModelConfig(T2V_A14B.variant if is_a14b else "t2v-custom", dit, text, vae, sampling)
