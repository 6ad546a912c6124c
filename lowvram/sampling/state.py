"""The state file of an interrupted run, replaced atomically after every denoising step."""

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
from lowvram.files.write import replace_file
from lowvram.memory.out_of_memory import as_out_of_memory
from lowvram.request import Request

FORMAT_VERSION = "3"


@dataclass(frozen=True)
class RunState:
    """State of a run after `step` finished denoising steps.

    model: fingerprint of the store; arithmetic: its name (`models.numerics.arithmetic`);
    latents: [C, T, h, w] float32; solver: the solver's `state_dict`.
    """

    request: Request
    model: str
    arithmetic: str
    step: int
    latents: Tensor
    solver: dict[str, Tensor]


class StateHeader(msgspec.Struct, frozen=True):
    """Metadata of a state file. request: the `Request` as JSON."""

    lowvram_state: str
    request: str
    model: str
    arithmetic: str
    step: Annotated[int, msgspec.Meta(ge=0)]


def state_path(output: Path) -> Path:
    """Path of the state file for an output: `clip.mp4` -> `clip.mp4.resume`."""
    return output.with_name(output.name + ".resume")


def save_state(path: Path, state: RunState) -> None:
    """Write a state file atomically and sync it; a crash leaves the old file or the new one.

    Raises `OutputError`.
    """
    tensors = {"latents": state.latents.contiguous()} | {
        f"solver.{name}": value.contiguous() for name, value in state.solver.items()
    }
    metadata = {
        "lowvram_state": FORMAT_VERSION,
        "request": json.dumps(asdict(state.request)),
        "model": state.model,
        "arithmetic": state.arithmetic,
        "step": str(state.step),
    }
    replace_file(path, save({name: value.cpu() for name, value in tensors.items()}, metadata))


def load_state(path: Path, request: Request, model: str, arithmetic: str) -> RunState:
    """Read the state file of a run with the same request, model and attention dtype.

    Raises `ResumeError` if there is no file, it cannot be read or is damaged, or belongs to another
    run (the message names both values); `OutOfMemoryError` if it does not fit into memory. The file
    itself is never changed.
    """
    if not path.is_file():
        raise ResumeError(f"nothing to resume: {path} does not exist; run without --resume")
    try:
        with as_out_of_memory():
            metadata, tensors = _read(path)
        # Before the other fields, which differ between versions.
        version = metadata.get("lowvram_state", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ResumeError(
                f"{path} is of state version {version[:40]}, this is version {FORMAT_VERSION}: "
                f"remove it and run without --resume"
            )
        header = checked(metadata, StateHeader, strict=False)
        saved: dict[str, object] = {
            "model": header.model,
            "arithmetic": header.arithmetic,
        }
        saved |= asdict(msgspec.json.decode(header.request, type=Request))
        step, latents = header.step, tensors.pop("latents")
    except (ResumeError, OutOfMemoryError):
        raise
    except OSError as error:
        raise ResumeError(
            f"{path} cannot be read ({error.strerror or error}): it was not changed; check the "
            f"disk, then use --resume again"
        ) from error
    except Exception as error:  # a damaged file can fail in any parser
        raise ResumeError(
            f"{path} is not the state of an interrupted run ({error}): remove it and run "
            f"without --resume"
        ) from error
    _require_equal(path, saved, {"model": model, "arithmetic": arithmetic} | asdict(request))
    solver = {name.removeprefix("solver."): value for name, value in tensors.items()}
    return RunState(request, model, arithmetic, step, latents, solver)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors. Raises `OSError` if the disk fails, `CheckpointError` if the file
    is not safetensors.
    """
    try:
        with TensorFile(path) as file:
            # Clones are allocated by torch, whose memory is counted against the RAM budget.
            return file.header.metadata, {
                name: file.read(name, mapped=False).clone() for name in file.header.tensors
            }
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _require_equal(path: Path, saved: dict[str, object], wanted: dict[str, object]) -> None:
    """Raise `ResumeError` that names every saved value differing from the wanted one."""
    differing = [
        f"{name} was {saved[name]!r}, now {wanted[name]!r}"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if differing:
        raise ResumeError(
            f"{path} belongs to another run: {'; '.join(differing)}; use the same settings, or "
            f"remove it and run without --resume"
        )
