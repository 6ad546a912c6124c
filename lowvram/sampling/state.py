"""What an interrupted run continues from: one file, replaced atomically after every step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from safetensors.torch import save
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.errors import CheckpointError, OutOfMemoryError, ResumeError
from lowvram.files.checked import checked
from lowvram.files.io import replace_file
from lowvram.memory.out_of_memory import as_out_of_memory
from lowvram.request import Request

FORMAT_VERSION = "2"


@dataclass(frozen=True)
class RunState:
    """The latents after `step` finished steps. solver: its `state_dict`; model: fingerprint of the
    store; attention_values: the dtype that attention multiplies values in.
    """

    request: Request
    model: str
    attention_values: str
    step: int
    latents: Tensor
    solver: dict[str, Tensor]


class StateHeader(msgspec.Struct, frozen=True):
    """The metadata of a state file; request: JSON of the `Request`."""

    lowvram_state: str
    request: str
    model: str
    attention_values: str
    step: Annotated[int, msgspec.Meta(ge=0)]


def state_path(output: Path) -> Path:
    """`clip.mp4` -> `clip.mp4.resume`, beside the output."""
    return output.with_name(output.name + ".resume")


def save_state(path: Path, state: RunState) -> None:
    """Writes beside `path`, flushes to the disk, renames: after a kill there is the old state or
    the new one.
    """
    tensors = {"latents": state.latents.contiguous()} | {
        f"solver.{name}": value.contiguous() for name, value in state.solver.items()
    }
    metadata = {
        "lowvram_state": FORMAT_VERSION,
        "request": json.dumps(asdict(state.request)),
        "model": state.model,
        "attention_values": state.attention_values,
        "step": str(state.step),
    }
    replace_file(path, save({name: value.cpu() for name, value in tensors.items()}, metadata))


def load_state(path: Path, request: Request, model: str, attention_values: str) -> RunState:
    """Raises `ResumeError` where there is nothing to resume, or where it was begun with another
    request, model or arithmetic: the message names both values. `OutOfMemoryError` and a file that
    the disk does not give say nothing about the state, which stays as it is.
    """
    if not path.is_file():
        raise ResumeError(f"nothing to resume: {path} does not exist; run without --resume")
    try:
        with as_out_of_memory():
            metadata, tensors = _read(path)
        version = metadata["lowvram_state"]
        if version != FORMAT_VERSION:
            raise ResumeError(
                f"{path} is of state version {version}, this is version {FORMAT_VERSION}: remove "
                f"it and run without --resume"
            )
        header = checked(metadata, StateHeader, strict=False)
        saved: dict[str, object] = {
            "model": header.model,
            "attention_values": header.attention_values,
        }
        saved |= asdict(msgspec.json.decode(header.request, type=Request))
        step, latents = header.step, tensors.pop("latents")
    except (ResumeError, OutOfMemoryError):
        raise
    except OSError as error:
        raise ResumeError(
            f"{path} cannot be read ({error.strerror or error}): it stays as it is; check the "
            f"disk, then --resume"
        ) from error
    except Exception as error:  # whatever a damaged file makes of its numbers and its JSON
        raise ResumeError(
            f"{path} is not the state of an interrupted run ({error}): remove it and run "
            f"without --resume"
        ) from error
    _require_equal(
        path, saved, {"model": model, "attention_values": attention_values} | asdict(request)
    )
    solver = {name.removeprefix("solver."): value for name, value in tensors.items()}
    return RunState(request, model, attention_values, step, latents, solver)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. Raises `OSError` where the disk does not give them, `CheckpointError`
    where it is no such file.
    """
    try:
        with TensorFile(path) as file:
            # Clones lie in torch's own memory, where all that a run holds is counted.
            return file.header.metadata, {
                name: file.read(name, mapped=False).clone() for name in file.header.tensors
            }
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _require_equal(path: Path, saved: dict[str, object], wanted: dict[str, object]) -> None:
    differing = [
        f"{name} was {saved[name]!r}, now {wanted[name]!r}"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if differing:
        raise ResumeError(
            f"{path} belongs to another run: {'; '.join(differing)}; ask for the same, or "
            f"remove it and run without --resume"
        )
