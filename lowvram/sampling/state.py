"""The state file of an interrupted run, replaced atomically after every denoising step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import TensorInfo
from lowvram.errors import CheckpointError, OutOfMemoryError, ResumeError
from lowvram.files.checked import checked
from lowvram.files.output import RESUME
from lowvram.files.write import MAKE_ROOM, replace_file
from lowvram.memory.out_of_memory import as_out_of_memory
from lowvram.request import Request

FORMAT_VERSION = "3"
SOLVER = "solver."  # begins the names of the solver's tensors
MOST_TENSORS = 5  # latents; index, sample and two clean samples of a solver


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
    return output.with_name(output.name + RESUME)


def save_state(path: Path, state: RunState) -> None:
    """Write a state file atomically and sync it; a crash leaves the old file or the new one.

    Raises `OutputError`.
    """
    tensors = {"latents": state.latents} | {
        f"{SOLVER}{name}": value for name, value in state.solver.items()
    }
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        "lowvram_state": FORMAT_VERSION,
        "request": json.dumps(asdict(state.request)),
        "model": state.model,
        "arithmetic": state.arithmetic,
        "step": str(state.step),
    }
    metadata["sha256"] = _checksum(metadata, tensors)
    # without a finished step there is nothing to resume
    saved = "make room and go on with --resume" if path.exists() else MAKE_ROOM
    replace_file(path, save(tensors, metadata), saved)


def saved_seed(path: Path) -> int | None:
    """The seed in a state file, not checked yet; None if it cannot be read."""
    try:
        with TensorFile(path) as file:
            return msgspec.json.decode(file.metadata["request"], type=Request).seed
    except Exception:  # `load_state` says what is wrong
        return None


def load_state(
    path: Path, request: Request, model: str, arithmetic: str, shape: tuple[int, ...]
) -> RunState:
    """Read the state file of a run with the same request, model and arithmetic.

    shape: of the latents. Raises `ResumeError` if there is no file, it cannot be read or is not as
    it was written, or belongs to another run (the message names both values); `OutOfMemoryError` if
    it does not fit into memory. The file itself is never changed.
    """
    if not path.is_file():
        raise ResumeError(f"nothing to resume: {path} does not exist; run without --resume")
    try:
        with as_out_of_memory(), _causes_of_checkpoint_errors(), TensorFile(path) as file:
            metadata = dict(file.header.metadata)
            # Before the other fields, which differ between versions.
            version = metadata.get("lowvram_state", FORMAT_VERSION)
            if version != FORMAT_VERSION:
                raise ResumeError(
                    f"{path} is of state version {version[:40]}, this is version "
                    f"{FORMAT_VERSION}: remove it and run without --resume"
                )
            header = checked(metadata, StateHeader, strict=False)
            saved: dict[str, object] = {"model": header.model, "arithmetic": header.arithmetic}
            saved |= asdict(msgspec.json.decode(header.request, type=Request))
            _require_equal(
                path, saved, {"model": model, "arithmetic": arithmetic} | asdict(request)
            )
            _check_tensors(file.header.tensors, shape)
            tensors = {name: file.read(name) for name in file.header.tensors}
        if metadata.pop("sha256", None) != _checksum(metadata, tensors):
            raise ValueError("it has been changed: its checksum is another")
        step, latents = header.step, tensors.pop("latents")
        if int(tensors.get(f"{SOLVER}index", step)) != step:
            raise ValueError(f"its solver is not at step {step}")
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
    solver = {name.removeprefix(SOLVER): value for name, value in tensors.items()}
    return RunState(request, model, arithmetic, step, latents, solver)


@contextmanager
def _causes_of_checkpoint_errors() -> Iterator[None]:
    """Raise the `OSError` that made a file unreadable instead of the `CheckpointError`."""
    try:
        yield
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in a state file: metadata, and names, dtypes, shapes and bytes of the
    tensors.
    """
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensors(tensors: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless these can be the tensors of a state, before any is read."""
    if "latents" not in tensors:
        raise ValueError("it has no latents")
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"it has {len(tensors)} tensors, a state at most {MOST_TENSORS}")
    for name, info in tensors.items():
        wanted = ("I64", ()) if name == f"{SOLVER}index" else ("F32", shape)
        if (info.dtype, tuple(info.shape)) != wanted:
            raise ValueError(
                f"its {name[:40]} is {info.dtype} {list(info.shape)}, not {wanted[0]} "
                f"{list(wanted[1])}"
            )


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
