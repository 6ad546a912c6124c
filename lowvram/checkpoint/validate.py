"""Compare the tensors of a source with those that the model needs, and report all differences."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from lowvram.checkpoint.dialects.table import Dialect, is_scale
from lowvram.checkpoint.names import Shape, dit_shapes, text_encoder_shapes, vae_shapes
from lowvram.checkpoint.readers.safetensors_header import TensorInfo
from lowvram.checkpoint.readers.shards import RawTensors, named
from lowvram.errors import CheckpointError, MissingTensorsError
from lowvram.variants import EXPERTS, ModelConfig

_log = logging.getLogger(__name__)
_OTHER = {
    "high_noise": re.compile(r"low[\W_]?noise", re.IGNORECASE),
    "low_noise": re.compile(r"high[\W_]?noise", re.IGNORECASE),
}


class QuantizedSourceError(CheckpointError):
    """The source is already quantized, in a format that is not supported.

    Without its scales the weights would be wrong.
    """


_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


class WrongExpertError(CheckpointError):
    """The experts are swapped, or one expert is given twice."""


def expected_shapes(config: ModelConfig, component: str) -> dict[str, Shape]:
    """Shapes of all tensors of a component, by official name."""
    if component == "text_encoder":
        return text_encoder_shapes(config.text_encoder)
    return vae_shapes(config.vae) if component == "vae" else dit_shapes(config.dit)


def check_dialect(component: str, raw: RawTensors, dialect: Dialect, unknown: list[str]) -> None:
    """Raises `QuantizedSourceError` for a dialect that is not read and for weights in a dtype that
    the dialect does not have. unknown: tensors that the model does not have.
    """
    if dialect.rows is None:
        scales = [name for name in raw.infos if is_scale(name)]
        raise QuantizedSourceError(
            f"{raw.where}: {component} is quantized in a dialect that is not supported "
            f"({dialect.name}): {len(scales)} scale tensors would stay unused: "
            f"{named(scales)}; use the unquantized model"
        )
    odd = [
        name
        for name, info in raw.infos.items()
        if info.dtype not in dialect.dtypes and name not in unknown and not dialect.consumes(name)
    ]
    if odd:
        dtypes = ", ".join(sorted({raw.infos[name].dtype for name in odd}))
        raise QuantizedSourceError(
            f"{raw.where}: {len(odd)} tensors of {component} are stored as {dtypes}: "
            f"{named(odd)}; use the unquantized model "
            f"({', '.join(dialect.dtypes)})"
        )


def problems(
    component: str,
    where: Path,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, Shape],
    unknown: list[str],
) -> list[str]:
    """Describe all missing, unexpected and misshapen tensors: one text per kind.

    unknown: stored names without an official name; they count as unexpected.
    """
    missing = [name for name in expected if name not in found]
    extra = unknown + [name for name in found if name not in expected]
    wrong = [
        name for name, shape in expected.items() if name in found and found[name].shape != shape
    ]
    texts = []
    if missing:
        texts.append(f"{len(missing)} of {len(expected)} tensors are missing: {named(missing)}")
    if extra:
        texts.append(f"{len(extra)} tensors are unexpected: {named(extra)}")
    if wrong:
        shown = [
            f"{name} is {list(found[name].shape)}, expected {list(expected[name])}"
            for name in wrong
        ]
        texts.append(f"{len(wrong)} tensors have the wrong shape: {named(shown)}")
    return [f"{component} ({where}): {text}" for text in texts]


def raise_problems(texts: list[str], unknown: list[str]) -> None:
    """Raise `MissingTensorsError` with all texts, if there are any.

    unknown: tensors that the model does not have.
    """
    if not texts:
        return
    advice = "download it again, or give the folder with the matching config.json"
    prefix = next((text for text in _PREFIXES if any(n.startswith(text) for n in unknown)), "")
    if prefix:
        advice = (
            f"names that begin with {prefix!r} are ComfyUI's, which are not read yet: give the "
            f"official or the diffusers model"
        )
    raise MissingTensorsError(f"{'; '.join(texts)}: {advice}")


def check_experts(raw: Mapping[str, RawTensors]) -> None:
    """Raise `WrongExpertError` when file names or titles say that the experts are swapped.

    Also when both experts are the same files. Other texts that say so are logged.
    """
    for component in EXPERTS:
        other, own = _OTHER[component], _OTHER[EXPERTS[1 - EXPERTS.index(component)]]
        for notes, is_title in ((raw[component].names, True), (raw[component].notes, False)):
            for note in notes:
                if not other.search(note) or own.search(note):
                    continue
                text = f"{component} is expected here, but a file in it says {note[:120]!r}"
                if is_title:
                    raise WrongExpertError(
                        f"{raw[component].where}: {text}: put each expert into its own folder"
                    )
                _log.warning(
                    "%s: %s: check that the experts are not swapped", raw[component].where, text
                )
    high, low = (set(map(_identity, raw[name].files)) for name in EXPERTS)
    if high & low:
        both = f"{raw['high_noise'].where} and {raw['low_noise'].where}"
        raise WrongExpertError(
            f"{both} are the same files, but the model needs both experts: download the other one"
        )


def _identity(path: Path) -> tuple[int, int] | str:
    """What tells two files apart; some network drives number no files."""
    item = path.stat()
    return (item.st_dev, item.st_ino) if item.st_ino else os.path.realpath(path)


def check_config(path: Path, config: ModelConfig) -> None:
    """Raise `CheckpointError` when the dimensions of the components do not match each other."""
    dit, text, vae = config.dit, config.text_encoder, config.vae
    if dit.text_dim != text.d_model:
        text_widths = (
            f"the experts take text features of width {dit.text_dim}, but the text encoder "
            f"returns {text.d_model}"
        )
        raise CheckpointError(f"{path}: {text_widths}: take all parts from one model")
    if not dit.in_dim == dit.out_dim == vae.z_dim == 16:
        raise CheckpointError(
            f"{path}: the experts take {dit.in_dim} and return {dit.out_dim} channels, the VAE "
            f"has {vae.z_dim}: only text-to-video models "
            "with 16 latent channels are supported, give one of them"
        )
