"""Promises 26, 29 and 31: of every kind of file that the program reads, mutations drawn anew at
each run give the same result or one line of an error, soon and within bounded memory.

`LOWVRAM_MUTATIONS=1000` draws more of each kind.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowvram_quantize.convert import quantize
from lowvram_quantize.progress import QuantizeProgress
from lowvram_quantize.report import read_report

from lowvram.checkpoint.readers.pickle import PickleFile
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.source import open_source
from lowvram.cli.first_checks import read_prompt
from lowvram.doctor import kernel_check
from lowvram.errors import LowvramError
from lowvram.files.lock import OutputLock
from lowvram.hardware.profile import ProfileKey, load_profile, save_profile
from lowvram.prompt.cache import PromptCache
from lowvram.prompt.tokenizer import tokenize
from lowvram.request import Request
from lowvram.sampling.state import RunState, load_state, save_state
from lowvram.store.inspect import inspect_path
from lowvram.store.manifest import MANIFEST_NAME, STAGING_NAME, read_manifest
from lowvram.store.reader import open_store
from lowvram.timing.cards import find_card
from lowvram.video import read_metadata, write_video
from tests.helpers.checkpoints import tiny_config, write_official

COUNT = int(os.environ.get("LOWVRAM_MUTATIONS", "40"))
SECONDS, MEMORY_BYTES = 2.0, 256 * 10**6
CONFIG = tiny_config(num_layers=1)
NUMBERS = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"9223372036854775808",
    b"1048576",
    b"null",
    b'"x"',
    b"[]",
]

Read = Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """A file and what is made of it; exact: the result may not change without an error; share: of
    the mutations, one in so many is tried, because each takes long.
    """

    path: Path
    read: Read
    exact: bool = True
    share: int = 1


def _stop_in(component: str) -> Callable[[QuantizeProgress], None]:
    seen = 0

    def stop(event: QuantizeProgress) -> None:
        nonlocal seen
        seen += event.phase == "quantize" and event.component == component
        if seen == 10:
            raise KeyboardInterrupt

    return stop


def tensors_of(file: TensorFile | PickleFile) -> list[tuple[str, tuple[int, ...]]]:
    for name in file.tensors:
        file.read(name)
    return sorted((name, tuple(info.shape)) for name, info in file.tensors.items())


def store_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_store(path) as store:
        for component, file in store.files.items():
            for name in file.header.tensors:
                digest.update(component.encode() + name.encode())
                digest.update(file.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest() + store.format + str(store.config)


class Folder:
    """One of each kind of file, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = write_official(folder / "source", CONFIG, pickle=True)
        # opening a pickle leaves something behind in torch
        self.plain = write_official(folder / "plain", CONFIG)
        (self.plain / "lowvram_defaults.json").write_text('{"steps": 20, "shift": 5.5}')
        self.store = folder / "store"
        quantize(self.source, self.store, allow_pickle=True)

    def kind(self, name: str) -> Kind:
        made: Kind = getattr(self, name.replace(" ", "_"))()
        return made

    def safetensors(self) -> Kind:
        path = self.store / "vae.safetensors"

        def read() -> Any:
            with TensorFile(path) as file:
                return tensors_of(file)

        return Kind(path, read, exact=False)

    def pickle(self) -> Kind:
        path = self.source / "Wan2.1_VAE.pth"

        def read() -> Any:
            with PickleFile(path, True) as file:
                return tensors_of(file)

        return Kind(path, read, exact=False)

    def _source(self, *parts: str) -> Kind:
        def read() -> None:
            open_source(self.plain).close()
            inspect_path(self.plain, False)

        return Kind(self.plain.joinpath(*parts), read, exact=False)

    def config(self) -> Kind:
        return self._source("low_noise_model", "config.json")

    def index(self) -> Kind:
        return self._source("high_noise_model", "diffusion_pytorch_model.safetensors.index.json")

    def defaults(self) -> Kind:
        return self._source("lowvram_defaults.json")

    def source_tokenizer(self) -> Kind:
        return self._source("google", "umt5-xxl", "tokenizer.json")

    def manifest(self) -> Kind:
        return Kind(
            self.store / MANIFEST_NAME,
            lambda: (read_manifest(self.store), store_digest(self.store)),
        )

    def store_file(self) -> Kind:
        return Kind(self.store / "high_noise.safetensors", lambda: store_digest(self.store))

    def report(self) -> Kind:
        return Kind(
            self.store / "quantization_report.json", lambda: read_report(self.store), exact=False
        )

    def tokenizer(self) -> Kind:
        path = self.store / "tokenizer.json"
        return Kind(path, lambda: tokenize(path.read_bytes(), "a red ball", 10**6), exact=False)

    def state(self) -> Kind:
        path, request = self.folder / "clip.mp4.resume", Request(prompt="a ball", steps=9)
        latents = torch.arange(64.0).reshape(4, 4, 2, 2)
        save_state(path, RunState(request, "model", "fp32", 2, latents, {"index": torch.tensor(2)}))

        def read() -> Any:
            found = load_state(path, request, "model", "fp32", (4, 4, 2, 2))
            return found.step, found.latents.tolist()

        return Kind(path, read)

    def profile(self) -> Kind:
        key = ProfileKey("gpu", "driver", "torch", "lowvram")
        made = save_profile(find_card("RTX 4090").profile(), key, self.folder)
        assert made is not None
        return Kind(made, lambda: load_profile(key, self.folder))

    def kernel_checks(self) -> Kind:
        from lowvram_kernels.check import Check

        key = kernel_check.KernelKey(**dict.fromkeys(kernel_check.KernelKey.__annotations__, "x"))
        path = self.folder / "kernels.json"
        kernel_check._save(path, key, [Check("op", "case", "ok", "")])
        return Kind(path, lambda: kernel_check._load(path, key))

    def prompt_cache(self) -> Kind:
        cache = PromptCache(self.folder / "prompts")
        features = torch.arange(32.0).reshape(4, 8)
        cache.save("0" * 64, features)

        def read() -> Any:
            found = cache.load("0" * 64, (4, 8), torch.float32)
            return None if found is None else found.tolist()

        return Kind(next((self.folder / "prompts").iterdir()), read)

    def video(self) -> Kind:
        path = self.folder / "clip.mp4"
        write_video(path, [torch.zeros(16, 16, 3, dtype=torch.uint8)], 16, {"generator": "lowvram"})
        return Kind(path, lambda: read_metadata(path), exact=False)

    def prompt_file(self) -> Kind:
        path = self.folder / "prompt.txt"
        path.write_text("a red ball — “quoted”", encoding="utf-8")
        return Kind(path, lambda: read_prompt(None, path), exact=False)

    def run_journal(self) -> Kind:
        return self._staged("run.jsonl")

    def tensor_journal(self) -> Kind:
        return self._staged("low_noise.safetensors.partial.journal")

    def partial_file(self) -> Kind:
        return self._staged("low_noise.safetensors.partial")

    def _staged(self, name: str) -> Kind:
        """A file of an interrupted quantizer; the result is the store that a resumed one makes."""
        model, kept = self.folder / "model", self.folder / "kept"
        if not kept.exists():
            with pytest.raises(KeyboardInterrupt):
                quantize(self.plain, model, progress=_stop_in("low_noise"))
            shutil.copytree(model / STAGING_NAME, kept)
        path = kept / name

        def read() -> dict[str, str]:
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(kept, model / STAGING_NAME)
            quantize(self.plain, model, resume=True)
            return {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in model.iterdir()
                if file.suffix in (".safetensors", ".json")
            }

        return Kind(path, read, share=8)

    def lock(self) -> Kind:
        folder = self.folder / "locked"
        folder.mkdir()
        lock = OutputLock(folder)
        path, text = lock.holder_path, lock.holder_path.read_bytes()
        lock.release()
        # of a process that is gone
        path.write_bytes(text.replace(str(os.getpid()).encode(), b"4194000"))

        def read() -> None:
            OutputLock(folder).release()

        return Kind(path, read, exact=False)


KINDS = [name for name in vars(Folder) if not name.startswith("_") and name != "kind"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("pristine"))


@dataclass(frozen=True)
class Edit:
    """One change of a file. place: 0 .. 1 of its length; near: among its first 4096 bytes."""

    change: str
    place: float
    near: bool
    length: int
    bit: int
    new: bytes
    times: int
    number: bytes


EDITS = st.lists(
    st.builds(
        Edit,
        st.sampled_from(["bit", "lose", "double", "new", "cut", "number", "zeros"]),
        st.floats(0, 1),
        st.booleans(),
        st.integers(1, 64),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=16),
        st.sampled_from([1, 2, 1000]),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, edits: list[Edit]) -> bytes:
    """Bits, spans that are lost, doubled or new, other numbers."""
    data = bytearray(content)
    for edit in edits:
        size = len(data)
        at = min(max(0, size - 1), int(edit.place * (min(size, 4096) if edit.near else size)))
        span = slice(at, at + edit.length)
        if edit.change == "bit" and size:
            data[at] ^= 1 << edit.bit
        elif edit.change == "lose":
            del data[span]
        elif edit.change == "double":
            data[at:at] = data[span] * edit.times
        elif edit.change == "new":
            data[at:at] = edit.new
        elif edit.change == "cut":
            del data[at:]
        elif edit.change == "zeros":
            data[span] = bytes(len(data[span]))
        elif edit.change == "number":
            found = re.compile(rb"\d+").search(data, at, at + 4096)
            if found:
                data[found.start() : found.end()] = edit.number
    return bytes(data)


def outcome(read: Read) -> tuple[str, Any]:
    """("same", the result) or ("error", the message), which is one line."""
    try:
        return "same", read()
    except LowvramError as error:
        return "error", str(error)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_p26_a_mutated_file_is_an_error_or_changes_nothing(
    name: str, pristine: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = pristine.kind(name)
    content = kind.path.read_bytes()
    expected = outcome(kind.read)
    assert expected[0] == "same"
    began_bytes = peak_bytes()
    errors = 0

    @settings(
        max_examples=max(1, COUNT // kind.share),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(EDITS)
    def mutate(edits: list[Edit]) -> None:
        nonlocal errors
        kind.path.write_bytes(mutated(content, edits))
        began = time.thread_time()
        found = outcome(kind.read)
        assert time.thread_time() - began < SECONDS
        assert found[0] == "same" or "\n" not in found[1]
        errors += found[0] == "error" or found[1] is None
        if kind.exact and found[0] == "same" and found[1] is not None:
            assert found == expected

    try:
        mutate()
    finally:
        kind.path.parent.mkdir(exist_ok=True)
        kind.path.write_bytes(content)
    assert outcome(kind.read)[0] == "same"
    assert peak_bytes() - began_bytes < MEMORY_BYTES
    if kind.exact and kind.share == 1:
        assert errors > COUNT // 4
