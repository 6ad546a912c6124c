"""The state of an interrupted run is used as it was written, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowvram.errors import DiskFullError, ResumeError
from lowvram.request import Request
from lowvram.sampling.state import RunState, load_state, save_state, saved_seed

SHAPE = (2, 1, 3, 4)
REQUEST = Request("a circle", width=64, height=64, num_frames=5, steps=4)


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "clip.mp4.resume"
    solver = {"index": torch.tensor(2), "sample": random(1)}
    solver |= {"clean.0": random(2), "clean.1": random(3)}
    save_state(path, RunState(REQUEST, "model", "int8", 2, random(0), solver))
    return path


def loaded(path: Path) -> RunState:
    return load_state(path, REQUEST, "model", "int8", SHAPE)


def test_a_state_comes_back_as_it_was(written: Path) -> None:
    state = loaded(written)
    assert (state.step, int(state.solver["index"])) == (2, 2)
    assert torch.equal(state.latents, random(0))
    assert [torch.equal(state.solver[f"clean.{age}"], random(2 + age)) for age in (0, 1)]


@settings(max_examples=1000, deadline=2000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_p26_no_changed_state_is_used(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bits flipped, bytes lost, added, zeroed or moved, anywhere in the file."""
    content = bytearray(written.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "zero tail", "swap", "header"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "more":
        content += data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "zero tail":
        content[place:] = bytes(len(content) - place)
    elif kind == "swap":
        other = data.draw(st.integers(0, len(content) - 1))
        content[place], content[other] = content[other], content[place]
    else:
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    changed = tmp_path / "changed.resume"
    changed.write_bytes(content)
    if bytes(content) == written.read_bytes():
        loaded(changed)
        return
    with pytest.raises(ResumeError) as error:
        loaded(changed)
    assert "changed.resume" in str(error.value)
    assert changed.read_bytes() == bytes(content)


def header_and_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, t: t.update(latents=t["solver.sample"]), "its checksum is another"),
        (lambda m, t: t.update({"solver.clean.0": t["latents"] * 0}), "its checksum is another"),
        (lambda m, t: m.update(step="3"), "its checksum is another"),
        (lambda m, t: m.pop("sha256"), "its checksum is another"),
        (lambda m, t: t.update(latents=t["latents"][:1]), "its latents is F32 [1, 1, 3, 4], not"),
        (lambda m, t: t.update(latents=t["latents"].half()), "its latents is F16 [2, 1, 3, 4]"),
        (lambda m, t: t.pop("latents"), "it has no latents"),
        (lambda m, t: t.update(extra=random(9)), "it has 6 tensors, a state at most 5"),
        (lambda m, t: m.update(request="{}"), "is not the state of an interrupted run"),
    ],
)
def test_p26_what_is_wrong_with_a_state_is_named(
    written: Path,
    tmp_path: Path,
    change: Callable[[dict[str, str], dict[str, torch.Tensor]], object],
    reason: str,
) -> None:
    metadata, tensors = header_and_tensors(written)
    change(metadata, tensors)
    path = tmp_path / "other.resume"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    with pytest.raises(ResumeError) as error:
        loaded(path)
    assert reason in str(error.value)
    assert "run without --resume" in str(error.value)


def test_the_seed_of_an_interrupted_run_is_found(written: Path, tmp_path: Path) -> None:
    """`--seed -1 --resume` goes on with it."""
    assert saved_seed(written) == 0
    garbage = tmp_path / "garbage.resume"
    garbage.write_bytes(b"garbage")
    assert saved_seed(garbage) is None
    assert saved_seed(tmp_path / "none.resume") is None


def test_p26_a_solver_at_another_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4.resume"
    solver = {"index": torch.tensor(3), "sample": random(1), "clean.0": random(2)}
    save_state(path, RunState(REQUEST, "model", "int8", 2, random(0), solver))
    with pytest.raises(ResumeError, match="its solver is not at step 2"):
        loaded(path)


def test_p31_a_large_sparse_state_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Its header promises 1 GiB of latents."""
    import json

    size = 2**30
    header = {"latents": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    whole = dict(header, __metadata__={"lowvram_state": "3"})
    text = json.dumps(whole).encode()
    path = tmp_path / "sparse.resume"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    with pytest.raises(ResumeError, match="is not the state of an interrupted run"):
        loaded(path)


def test_p33_a_full_disk_says_how_to_go_on_and_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first state the same command works again, after it only --resume does."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "clip.mp4.resume"
    state = RunState(REQUEST, "model", "int8", 2, random(0), {})
    for advice in ("make room and run it again", "make room and go on with --resume"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DiskFullError, match=advice):
                save_state(path, state)
        save_state(path, state)
