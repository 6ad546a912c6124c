"""Every byte that a run reads from a store is compared with the manifest at its first read."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from lowvram.errors import IntegrityError
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import PlanChoice
from lowvram.progress import Progress
from lowvram.store.hashes import TensorHashes
from lowvram.store.reader import open_store
from lowvram.variants import COMPONENTS
from tests.helpers.checkpoints import tiny_config
from tests.helpers.runs import digest, make_store, pipeline_of, plan_of, request_of

STEPS = 3  # the last is the low-noise expert's


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_store(folder, tiny_config(num_layers=5), "int8").close()
    return folder / "int8"


@pytest.fixture(scope="module")
def clean(pristine: Path) -> str:
    with open_store(pristine) as store:
        return clip(pipeline_of(store))


def clip(pipeline: Pipeline) -> str:
    return digest(pipeline.generate(request_of(pipeline, steps=STEPS)).frames)


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def attempt(store: Path) -> str:
    """The clip's digest, or the message of the error that is in its place."""
    try:
        with open_store(store) as opened:
            return clip(pipeline_of(opened))
    except IntegrityError as error:
        return str(error)


def test_each_tensor_is_compared_once_whichever_way_it_is_read(tmp_path: Path) -> None:
    data = [bytes(range(size)) for size in (3, 5, 7)]
    hashes = TensorHashes(
        tmp_path / "x",
        {str(number): hashlib.sha256(item).hexdigest() for number, item in enumerate(data)},
    )
    assert hashes.missing("012") == ["0", "1", "2"]
    hashes.check("0", memoryview(data[0]))
    hashes.check_pieces("1", [memoryview(data[1][:2]), memoryview(data[1][2:])])
    for task in hashes.tasks({"2": memoryview(data[2])}):
        task()
    assert hashes.missing("012") == []
    with pytest.raises(IntegrityError, match=r"x: 1 differs from its hash .* inspect .* --verify"):
        hashes.check("1", memoryview(data[2]))


@pytest.mark.parametrize("component", COMPONENTS)
def test_p26_a_flipped_bit_anywhere_in_a_store_is_named(
    component: str, pristine: Path, clean: str, tmp_path: Path
) -> None:
    """Drawn anew each time: an error, or a tensor that no clip needs (of the VAE's encoder)."""
    store = shutil.copytree(pristine, tmp_path / "store")
    path = store / f"{component}.safetensors"
    with open_store(store) as opened:
        tensors = list(opened.files[component].header.tensors.values())
    rng = random.Random()
    for _ in range(8):
        info = rng.choice(tensors)
        at, bit = rng.randrange(info.start, info.end), rng.randrange(8)
        flip(path, at, bit)
        needed = component != "vae" or not info.name.startswith(("encoder.", "conv1."))
        found = attempt(store)
        assert f"{component}.safetensors: {info.name} differs" in found or (
            not needed and found == clean
        )
        flip(path, at, bit)


def test_p26_a_store_written_over_during_a_run_makes_no_mixed_video(
    pristine: Path, clean: str, tmp_path: Path
) -> None:
    """The second step would read blocks that were compared in the first."""
    store = shutil.copytree(pristine, tmp_path / "store")
    path = store / "high_noise.safetensors"

    def damage(event: Progress) -> None:
        if (event.phase, event.done) == ("denoise", 1):
            with open_store(store, sample=False) as other:
                block = other.files["high_noise"].blocks[-1]
            flip(path, block.start + 5, 0)

    with open_store(store) as opened:
        pipeline = pipeline_of(opened)
        request = request_of(pipeline, steps=4)
        # two slots for more blocks: every step reads them from the disk
        plan = plan_of(pipeline, request, PlanChoice(64, 2, 0, 0, False))
        with pytest.raises(IntegrityError, match=r"blocks\.4\."):
            pipeline.generate(request, plan=plan, listener=damage)


def test_p26_a_file_that_was_only_touched_is_read_again_and_gives_the_same_video(
    pristine: Path, clean: str, tmp_path: Path
) -> None:
    store = shutil.copytree(pristine, tmp_path / "store")
    with open_store(store) as opened:
        for component in COMPONENTS:
            (store / f"{component}.safetensors").touch()
        assert clip(pipeline_of(opened)) == clean


def test_what_is_compared_once_is_not_compared_again(
    pristine: Path, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0
    compare = TensorHashes._compare

    def count(self: TensorHashes, name: str, found: str) -> None:
        nonlocal counted
        counted += 1
        compare(self, name, found)

    monkeypatch.setattr(TensorHashes, "_compare", count)
    with open_store(pristine) as opened:
        pipeline = pipeline_of(opened)
        assert clip(pipeline) == clean
        names = [
            name
            for component, file in opened.files.items()
            for name in file.header.tensors
            if component != "vae" or not name.startswith(("encoder.", "conv1."))
        ]
        assert counted == len(names), "every tensor that a clip needs, once"
        clip(pipeline)
        assert counted == len(names)
