"""Open LoRA files, check every key against the expert, and merge them into its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import quoted
from lowvram.checkpoint.readers.shards import TITLES, named
from lowvram.checkpoint.readers.tensor_data import Rows
from lowvram.checkpoint.source import ComponentSource, Source
from lowvram.errors import LoraError, UsageError
from lowvram.lora.changes import (
    Delta,
    MergedRows,
    WrongShape,
    delta_of,
    kind_of,
    magnitudes_of,
    matrix_shape,
)
from lowvram.lora.keys import expected_shape, targets
from lowvram.units import shown
from lowvram.variants import EXPERTS, DiTConfig

_SAYS = {
    "high_noise": re.compile(r"high[_\- ]?noise|(?<![a-z])high(?![a-z])", re.IGNORECASE),
    "low_noise": re.compile(r"low[_\- ]?noise|(?<![a-z])low(?![a-z])", re.IGNORECASE),
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_HASH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA that the user names: its file, its strength, and the experts that it is for."""

    path: Path
    strength: float = 1.0
    experts: tuple[str, ...] = EXPERTS

    def __post_init__(self) -> None:
        if not -100 <= self.strength <= 100:
            raise UsageError(f"{self.path}: strength {self.strength} is outside -100 .. 100")


def parse_choice(text: str, experts: tuple[str, ...] = EXPERTS) -> LoraChoice:
    """`FILE` or `FILE:STRENGTH`. Raises `UsageError`."""
    name, colon, number = text.rpartition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:  # such as the rest of C:\\file
        name, colon, strength = text, "", 1.0
    path = name if colon else text
    if not path:
        raise UsageError(f"a LoRA is {shown(text)}: write it FILE or FILE:STRENGTH")
    return LoraChoice(Path(path), strength, experts)


class LoraFile:
    """An open LoRA for an expert of `config`; every key is known and every shape fits.

    The constructor raises `LoraError` naming file and key.
    """

    def __init__(self, choice: LoraChoice, config: DiTConfig) -> None:
        self.choice, self._config = choice, config
        path = choice.path
        if path.suffix != ".safetensors":
            raise LoraError(f"{path} is no .safetensors file: convert the LoRA, or give another")
        if not path.exists():
            raise LoraError(f"{path} does not exist: check the name of the LoRA")
        self._file = TensorFile(path)
        try:
            self._check_expert()
            self.targets, unknown = targets(self._file.tensors, config)
            if unknown:
                raise self._error(
                    f"{len(unknown)} of {len(self._file.tensors)} keys are of no tensor of this "
                    f"model, or repeat another: {named(unknown)}: it may be for another model"
                )
            if not self.targets:
                raise self._error("it changes nothing: it holds no tensors")
            for target in self.targets:
                self._change(target)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def sha256(self) -> str:
        """Hash of the whole file."""
        digest = hashlib.sha256()
        with open(self.choice.path, "rb") as file:
            while data := file.read(_HASH_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def merged(self, target: str, base: Rows) -> Rows:
        """The rows of a weight with this LoRA merged, or `base` where it changes nothing."""
        if target not in self.targets:
            return base
        return MergedRows(base, [self._change(target)])

    def _change(self, target: str) -> tuple[str, Delta, float, Tensor | None]:
        keys = self.targets[target]
        kind = kind_of(tuple(keys))
        if kind is None:
            raise self._error(
                f"the keys {named(list(keys.values()))} together are no change that is read: a "
                f"part of them is missing, or is of another kind"
            )
        shape = matrix_shape(expected_shape(target, self._config))
        try:
            parts = {part: self._read(part, key) for part, key in keys.items()}
            return (
                kind,
                delta_of(kind, parts, shape),
                self.choice.strength,
                magnitudes_of(parts, shape),
            )
        except WrongShape as error:
            raise self._error(
                f"{quoted(keys[error.part])} does not fit {target} {list(shape)}: {error}: it is "
                f"for another model"
            ) from error

    def _read(self, part: str, key: str) -> Tensor:
        info = self._file.tensors[key]
        if part != "alpha" and info.dtype not in _FLOATS:
            raise self._error(f"{quoted(key)} is stored as {info.dtype}, expected floats")
        if self._file.is_modified():
            raise self._error("it has changed since it was opened: start again")
        tensor = self._file.read(key)
        if not bool(torch.isfinite(tensor).all()):
            raise self._error(f"{quoted(key)} holds NaN or infinity: download it again")
        return tensor

    def _check_expert(self) -> None:
        """Raise `LoraError` if its name or title says that it is for the other expert alone."""
        texts = [self.choice.path.name]
        texts += [text for key, text in self._file.metadata.items() if key in TITLES]
        for expert in self.choice.experts:
            other = EXPERTS[1 - EXPERTS.index(expert)]
            for text in texts:
                if _SAYS[other].search(text) and not _SAYS[expert].search(text):
                    flag = other.removesuffix("_noise")
                    raise self._error(
                        f"{text[:120]!r} says that it is for the {other} expert: give it with "
                        f"--lora-{flag} alone"
                    )

    def _error(self, what: str) -> LoraError:
        return LoraError(f"{self.choice.path}: {what}")


@contextmanager
def with_loras(source: Source, choices: Sequence[LoraChoice]) -> Iterator[Source]:
    """A source whose experts' weights have LoRAs merged, one after the other, in fp32.

    Raises `LoraError`.
    """
    with ExitStack() as stack:
        components = dict(source.components)
        for expert in EXPERTS:
            loras = []
            for choice in choices:
                if expert in choice.experts:
                    loras.append(LoraFile(choice, source.config.dit))
                    stack.callback(loras[-1].close)
            if loras:
                components[expert] = _merging(components[expert], loras)
        yield replace(source, components=components)


def _merging(component: ComponentSource, loras: Sequence[LoraFile]) -> ComponentSource:
    changed = {target for lora in loras for target in lora.targets}

    def merge(target: str, rows: Rows) -> Rows:
        for lora in loras:
            rows = lora.merged(target, rows)
        return rows

    tensors = {
        name: replace(info, dtype="F32") if name in changed else info
        for name, info in component.tensors.items()
    }
    merged = tuple(
        f"{lora.choice.path.name} at {lora.choice.strength:g}, sha256 {lora.sha256()}"
        for lora in loras
    )
    return replace(component, tensors=tensors, merge=merge, merged=merged)
