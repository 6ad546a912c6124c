"""Memory that ends in the middle of a phase, with tensors in hand: they are dead before the phase
allocates again, and the video stays the same; where it never comes back, one line says what the
phase needs and what to do (promise 16).
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from lowvram import pipeline as pipeline_module
from lowvram.cli.app import app
from lowvram.errors import OutOfMemoryError
from lowvram.hardware.cgroups import HostMemory
from lowvram.memory import arena
from lowvram.models import wan
from lowvram.models.umt5 import TextEncoder
from lowvram.models.vae import WanVAE
from lowvram.pipeline import Pipeline
from lowvram.planner.fallback import VRAM, FallbackPlans
from lowvram.planner.phases import PHASES, PlanChoice
from lowvram.planner.plan import MemoryPlan
from lowvram.request import Request
from lowvram.sampling import recovery, state
from lowvram.sampling.denoise import block_schedule
from lowvram.sampling.schedule import make_schedule
from lowvram.store.reader import Store, StoreFile
from lowvram.units import format_bytes
from tests.helpers.checkpoints import tiny_config
from tests.helpers.runs import digest, make_store, plan_of, request_of
from tests.helpers.staged import StagedPipeline, StagedTransport
from tests.helpers.threads import lowvram_threads

# One slot, no block kept on the device: every visit is a copy, and one through staging, since no
# cached block is page-locked.
CHOICE = PlanChoice(64, 1, 0, 2, False)
NUMBER_BYTES = 8  # the step's number, a tensor in a solver's state
TILED = {"width": 464, "height": 32, "num_frames": 5, "steps": 1}  # three tiles


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 336.00 MiB")


def python_error() -> Exception:
    return MemoryError()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("exhaustion"), tiny_config(), "int8")


@pytest.fixture
def pipeline(store: Store) -> StagedPipeline:
    return StagedPipeline(store)


def request(pipeline: Pipeline, **changes: Any) -> Request:
    usual: dict[str, Any] = {"shift": 8.0, "num_frames": 5, "negative_prompt": "blue"}
    return request_of(pipeline, **(usual | changes))


@pytest.fixture(scope="module")
def expected(store: Store) -> Callable[[Request], str]:
    """The digest of an undisturbed run."""
    known: dict[Request, str] = {}

    def of(request: Request) -> str:
        if request not in known:
            pipeline = StagedPipeline(store)
            known[request] = digest(
                pipeline.generate(request, plan=plan_of(pipeline, request, CHOICE)).frames
            )
        return known[request]

    return of


class Living(TorchDispatchMode):
    """Every tensor's memory that this thread makes while the mode is on, by a number that grows,
    until it is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.made = 0
        self._alive: dict[int, int] = {}  # number -> bytes
        self._numbers: dict[int, int] = {}  # where a storage lies -> its number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata], self._alive[self.made] = self.made, storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata).atexit = False
            self.made += 1

    def _freed(self, where: int) -> None:
        del self._alive[self._numbers.pop(where)]

    def since(self, first: int, but: tuple[torch.Tensor, ...] = ()) -> list[int]:
        """Bytes of what lives, was made from number `first` on and is more than a number; `but` may
        live.
        """
        kept = {self._numbers.get(tensor.untyped_storage()._cdata) for tensor in but}
        return [
            nbytes
            for number, nbytes in list(self._alive.items())
            if number >= first and number not in kept and nbytes > NUMBER_BYTES
        ]


class Attempts:
    """Watches a phase: whenever `again` is entered after a fault, nothing lives that the phase made
    before, but for what it is given.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        living: Living,
        phase: tuple[Any, str],
        again: tuple[Any, str],
    ) -> None:
        self.faults = self.checked = 0
        self.held: list[int] = []  # bytes in hand when memory ended
        self.left: list[list[int]] = []
        self._living, self._first = living, 0
        if phase != again:
            self._wrap(patch, *phase, self._begin)
        self._wrap(patch, *again, self._begin if phase == again else self._enter)

    def _wrap(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[..., None]
    ) -> None:
        real = getattr(owner, name)

        def entered(*args: Any, **kwargs: Any) -> Any:
            before(*args)
            return real(*args, **kwargs)

        patch.setattr(owner, name, entered)

    def _begin(self, *args: Any) -> None:
        self._enter(*args)
        if self.faults == 0:
            self._first = self._living.made

    def _enter(self, *args: Any) -> None:
        if self.faults > self.checked:
            self.checked = self.faults
            self.left.append(self._living.since(self._first, tuple(tensors_in(args))))

    def fault(self, error: Callable[[], Exception]) -> None:
        self.faults += 1
        self.held.append(sum(self._living.since(self._first)))
        raise error()


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of arguments, states and solvers."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, state.RunState):
            yield from (value.latents, *value.solver.values())
        elif hasattr(value, "state_dict") and not isinstance(value, torch.nn.Module):
            yield from value.state_dict().values()


Inject = Callable[
    [pytest.MonkeyPatch, StagedPipeline, Attempts, Callable[[], Exception], bool], None
]


def in_text_block(number: int) -> Inject:
    """While the block's result is in hand; each of two blocks runs once for each of two prompts."""

    def inject(
        patch: pytest.MonkeyPatch,
        pipeline: StagedPipeline,
        attempts: Attempts,
        error: Callable[[], Exception],
        ever: bool,
    ) -> None:
        real, calls = TextEncoder._run_block, [0]

        def run_block(self: TextEncoder, *arguments: Any) -> torch.Tensor:
            result = real(self, *arguments)
            calls[0] += 1
            if calls[0] == number or (ever and calls[0] > number):
                attempts.fault(error)
            return result

        patch.setattr(TextEncoder, "_run_block", run_block)

    return inject


def in_second_expert(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """Where its text embedding is read: the first expert and this one's time are in hand."""
    real, calls = wan.condition, [0]

    def condition(read: wan.ReadTensor, *arguments: Any) -> wan.Conditioning:
        calls[0] += 1
        failing = calls[0] == 2 or (ever and calls[0] % 2 == 0)

        def reading(name: str) -> torch.Tensor:
            if failing and name == "text_embedding.2.weight":
                attempts.fault(error)
            return read(name)

        return real(reading, *arguments)

    patch.setattr(pipeline_module, "condition", condition)


def in_third_tile(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """Behind its first latent frame: weights, caches and the row of tiles are in hand."""
    real, calls = WanVAE._decode_tile, [0]

    def decode_tile(self: WanVAE, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        calls[0] += 1
        failing = calls[0] == 3 or (ever and calls[0] % 3 == 0)
        for pixels in real(self, latents):
            yield pixels
            if failing:
                attempts.fault(error)

    patch.setattr(WanVAE, "_decode_tile", decode_tile)


def in_worker(hop: str) -> Inject:
    """In the worker's thread, at the first block of the second expert; when that comes back for
    ever, at the first of every attempt.
    """

    def inject(
        patch: pytest.MonkeyPatch,
        pipeline: StagedPipeline,
        attempts: Attempts,
        error: Callable[[], Exception],
        ever: bool,
    ) -> None:
        asked = request(pipeline)
        blocks = block_schedule(
            make_schedule("unipc", asked.steps, asked.shift), asked, 2, joint=False, first_step=0
        )
        switch = next(number for number, (expert, _) in enumerate(blocks) if expert == "low_noise")
        assert 0 < switch < len(blocks) - 1
        real = getattr(StagedTransport, hop)
        text = [2]  # blocks of the text encoder come first

        def carry(self: StagedTransport, *arguments: Any) -> Any:
            if hop == "copy" and text[0]:
                text[0] -= 1
                return real(self, *arguments)
            done = self.__dict__.setdefault("carried", 0)
            self.__dict__["carried"] += 1
            if (attempts.faults == 0 and done == switch) or (ever and attempts.faults):
                attempts.fault(error)
            return real(self, *arguments)

        patch.setattr(StagedTransport, hop, carry)

    return inject


def in_save(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """While the second step's state is made into a file's bytes, which are in hand."""
    calls = [0]

    def save(*arguments: Any) -> bytes:
        content: bytes = safetensors.torch.save(*arguments)
        calls[0] += 1
        if calls[0] == 2 or (ever and calls[0] > 2):
            attempts.fault(error)
        return content

    patch.setattr(state, "save", save)


TEXT, CONDITION, DECODE = (
    (Pipeline, name) for name in ("_encode_prompts", "_condition", "_decode")
)
STAGING = "the staging at the expert switch"
LOOP, ATTEMPT = (pipeline_module, "denoise_within_budgets"), (recovery, "_attempt")
# Where memory ends: the injection, the phase's entry, the entry of what is tried again, the phase
# as errors name it, its name in the plan.
PLACES: dict[str, tuple[Inject, tuple[Any, str], tuple[Any, str], str, str]] = {
    **{
        f"text block {number}": (in_text_block(number), TEXT, TEXT, "the text phase", "text")
        for number in (1, 2, 3, 4)
    },
    "the second expert's conditioning": (
        in_second_expert,
        CONDITION,
        CONDITION,
        "the conditioning phase",
        "conditioning",
    ),
    "the copy at the expert switch": (in_worker("copy"), LOOP, ATTEMPT, r"step \d of 3", "denoise"),
    STAGING: (in_worker("stage"), LOOP, ATTEMPT, r"step \d of 3", "denoise"),
    "the saved state": (
        in_save,
        LOOP,
        (pipeline_module, "save_state"),
        "saving step 2 of 3",
        "denoise",
    ),
    "the third tile": (in_third_tile, DECODE, DECODE, "the decode phase", "decode"),
}


def asked_at(place: str, pipeline: Pipeline) -> Request:
    return request(pipeline, **(TILED if place == "the third tile" else {}))


@pytest.mark.parametrize(
    ("place", "error"), list(zip(PLACES, cycle([cuda_error, python_error]), strict=False))
)
def test_p16_what_an_attempt_held_is_dead_before_the_next_one(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: str,
    error: Callable[[], Exception],
) -> None:
    inject, phase, again, _, _ = PLACES[place]
    asked = asked_at(place, pipeline)
    plan, whole = plan_of(pipeline, asked, CHOICE), expected(asked)
    told: list[int] = []
    with Living() as living, caplog.at_level(logging.WARNING):
        attempts = Attempts(monkeypatch, living, phase, again)
        inject(monkeypatch, pipeline, attempts, error, False)
        video = pipeline.generate(
            asked,
            plan=plan,
            state_file=tmp_path / "state",
            listener=lambda e: told.append(e.done) if e.phase == "denoise" else None,
        )
    assert digest(video.frames) == whole
    assert attempts.faults == 1
    assert attempts.held[0] > 10_000
    assert attempts.left == [[]]
    assert told == list(range(asked.steps + 1)), "every step is told once"
    assert len([record for record in caplog.records if "out of" in record.getMessage()]) == 1
    assert not lowvram_threads()


@pytest.mark.parametrize("place", [place for place in PLACES if place != STAGING])
def test_p16_memory_that_never_comes_back_is_a_clear_error(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """Through the command line: one line that names the phase, what it needs of the plan, and what
    can be done; no video.
    """
    inject, phase, again, named, name = PLACES[place]
    asked = asked_at(place, pipeline)
    plan, out = plan_of(pipeline, asked, CHOICE), tmp_path / "clip.mp4"
    monkeypatch.setattr(pipeline_module, "load", lambda *_: pipeline)
    monkeypatch.setattr(pipeline, "request", lambda *_, **__: asked)
    monkeypatch.setattr(pipeline, "plan", lambda *_: plan)
    with Living() as living:
        attempts = Attempts(monkeypatch, living, phase, again)
        inject(monkeypatch, pipeline, attempts, cuda_error, True)
        result = CliRunner().invoke(
            app, ["generate", str(tmp_path), "--prompt", "a", "--out", str(out)]
        )
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: out of VRAM in {named} \(CUDA out of memory", line), line
    assert "Traceback" not in result.output
    ended = foot_of(pipeline, asked, plan) if name == "denoise" else plan
    assert f"needs {format_bytes(needs(ended, name))} of VRAM" in line
    assert ("--resume" in line) is (tmp_path / "clip.mp4.resume").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["clip.mp4.resume"])
    assert (
        attempts.faults
        == {"text": 3, "decode": 3, "conditioning": 2}.get(name, attempts.faults)
        <= 8
    )
    assert attempts.left == [[]] * (attempts.faults - 1)
    assert not lowvram_threads()


def test_p16_staging_that_never_works_again_ends_in_the_video(
    pipeline: StagedPipeline, expected: Callable[[Request], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallbacks gives up the blocks that pass through it: the disk is read into the staging
    buffers themselves.
    """
    asked = request(pipeline)
    whole = expected(asked)
    with Living() as living:
        attempts = Attempts(monkeypatch, living, LOOP, ATTEMPT)
        in_worker("stage")(monkeypatch, pipeline, attempts, cuda_error, True)
        video = pipeline.generate(asked, plan=plan_of(pipeline, asked, CHOICE))
    assert digest(video.frames) == whole
    assert attempts.left == [[], []]


def needs(plan: MemoryPlan, phase: str, budget: str = "vram_bytes") -> int:
    (nbytes,) = (getattr(peak, budget) for peak in plan.phases if peak.phase == phase)
    return int(nbytes)


def foot_of(pipeline: Pipeline, request: Request, plan: MemoryPlan) -> MemoryPlan:
    fallbacks = FallbackPlans(plan, pipeline.new_run(request, plan).describe, shared=True)
    while fallbacks.down(VRAM):
        pass
    return fallbacks.plan


ENDLESS = """
import torch
from lowvram.cli.app import app
from tests.helpers import staged
from lowvram import pipeline

def refuse(*_):
    raise torch.OutOfMemoryError("CUDA out of memory: for ever")

pipeline.load = lambda path, *_: staged.StagedPipeline(pipeline.open_store(pipeline.Path(path)))
staged.StagedTransport.copy = refuse
app()
"""


def test_p16_a_process_whose_workers_find_no_memory_ends(store: Store, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    clip = ["--size", "64x64", "--frames", "5", "--steps", "2", "--out", str(tmp_path / "clip.mp4")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ENDLESS,
            "generate",
            str(store.path),
            "--prompt",
            "a",
            "--no-prompt-cache",
            *clip,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "error: out of VRAM in the text phase" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def fail_always(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    def fail(*_: Any) -> None:
        raise cuda_error()

    owner = {
        "text": (TextEncoder, "_run_block"),
        "conditioning": (pipeline_module, "condition"),
        "decode": (WanVAE, "_decode_tile"),
    }
    monkeypatch.setattr(*owner.get(phase, (wan.WanTransformer, "_run_block")), fail)


@pytest.fixture(scope="module")
def one_step(store: Store, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a run that was stopped behind its first step."""
    pipeline, file = StagedPipeline(store), tmp_path_factory.mktemp("stopped") / "state"
    asked = request(pipeline)

    def stop(event: Any) -> None:
        if event.phase == "denoise" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(
            asked, plan=plan_of(pipeline, asked, CHOICE), state_file=file, listener=stop
        )
    return file.read_bytes()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("phase", ["text", "conditioning", "denoise", "decode"])
def test_p16_the_advice_fits_the_phase_and_what_is_saved(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    one_step: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    phase: str,
    saved: bool,
) -> None:
    asked, file = request(pipeline), tmp_path / "clip.mp4.resume"
    plan = plan_of(pipeline, asked, CHOICE)
    if saved:
        file.write_bytes(one_step)
    elif phase != "decode":
        file.write_bytes(b"what another run has left")
    kept = file if saved or phase != "decode" else None
    with monkeypatch.context() as patch:
        fail_always(patch, phase)
        with pytest.raises(OutOfMemoryError) as failed:
            pipeline.generate(asked, plan=plan, state_file=kept, resume=saved)
    said = str(failed.value)
    assert "\n" not in said
    ended = foot_of(pipeline, asked, plan) if phase == "denoise" else plan
    assert f"it needs {format_bytes(needs(ended, phase))} of VRAM" in said
    assert ("and go on with --resume" in said, "and run it again" in said) == (saved, not saved), (
        said
    )
    assert ("--size" in said) is (phase in ("denoise", "decode")), (
        "where a smaller video would help"
    )
    assert ("begin anew" in said) is (saved and phase in ("denoise", "decode"))
    assert ("has nothing that it could give up" in said) is (phase == "conditioning")
    if saved and phase in ("denoise", "decode"):
        assert digest(
            pipeline.generate(asked, plan=plan, state_file=file, resume=True).frames
        ) == expected(asked)


def test_p16_a_failed_decode_may_be_resumed_where_steps_were_saved(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The steps of this very run, not of one before it."""
    asked = request(pipeline, steps=1)
    fail_always(monkeypatch, "decode")
    with pytest.raises(OutOfMemoryError, match="and go on with --resume"):
        pipeline.generate(
            asked, plan=plan_of(pipeline, asked, CHOICE), state_file=tmp_path / "state"
        )


def test_p16_the_noise_is_drawn_again(
    pipeline: StagedPipeline, expected: Callable[[Request], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(pipeline)
    plan, whole, real, calls = (
        plan_of(pipeline, asked, CHOICE),
        expected(asked),
        pipeline_module.draw_noise,
        [0],
    )

    def draw(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] <= failures:
            raise python_error()
        return real(*arguments)

    monkeypatch.setattr(pipeline_module, "draw_noise", draw)
    failures = 1
    assert digest(pipeline.generate(asked, plan=plan).frames) == whole
    calls, failures = [0], 9
    with pytest.raises(
        OutOfMemoryError,
        match=r"^out of RAM in the noise phase \(MemoryError\): it needs less RAM than any "
        r"phase .* run it again$",
    ):
        pipeline.generate(asked, plan=plan)
    assert calls == [2]


@pytest.mark.parametrize("slots", [1, 0])
def test_p16_the_text_phase_does_with_one_slot(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slots: int,
) -> None:
    """A machine that has room for one buffer of each kind, or for none."""
    asked = request(pipeline)
    plan, real, made = plan_of(pipeline, asked, CHOICE), arena.new_buffer, weakref.WeakSet[Any]()

    def new_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
        if nbytes == plan.text_slot_bytes:
            if len(made) >= 2 * slots:
                raise cuda_error()
            buffer = real(nbytes, device)
            made.add(buffer.untyped_storage())
            return buffer
        return real(nbytes, device)

    assert plan.text_slot_bytes != plan.slot_bytes
    monkeypatch.setattr(arena, "new_buffer", new_buffer)
    if slots:
        with caplog.at_level(logging.WARNING):
            assert digest(pipeline.generate(asked, plan=plan).frames) == expected(asked)
        assert f"trying it with {PHASES['text'].leaner}" in caplog.text
    else:
        with pytest.raises(
            OutOfMemoryError,
            match=re.escape(f"with {PHASES['text'].leaner} it still found too little"),
        ):
            pipeline.generate(asked, plan=plan)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_p16_the_decoder_does_without_most_of_its_weights(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float,
) -> None:
    """A machine that has room for half of them at a time, or for none."""
    asked = request(pipeline, **TILED)
    plan, whole = plan_of(pipeline, asked, CHOICE), expected(asked)
    file, alive, real = pipeline.store.files["vae"], [0], StoreFile.read
    total = sum(
        real(file, name).nbytes for name in file.rest if name.startswith(("decoder.", "conv2."))
    )

    def read(self: StoreFile, name: str, *arguments: Any, **named: Any) -> torch.Tensor:
        weight = real(self, name, *arguments, **named)
        if self is file:
            if alive[0] + weight.nbytes > share * total:
                raise cuda_error()
            alive[0] += weight.nbytes
            weakref.finalize(weight.untyped_storage(), free, weight.nbytes)
        return weight

    def free(nbytes: int) -> None:
        alive[0] -= nbytes

    monkeypatch.setattr(StoreFile, "read", read)
    if share:
        with caplog.at_level(logging.WARNING):
            assert digest(pipeline.generate(asked, plan=plan).frames) == whole
        assert f"trying it with {PHASES['decode'].leaner}" in caplog.text
    else:
        with pytest.raises(
            OutOfMemoryError,
            match=re.escape(f"with {PHASES['decode'].leaner} it still found too little"),
        ):
            pipeline.generate(asked, plan=plan)
    assert alive == [0]


class Counted:
    """Counts blocks computed, and by budget the bytes of buffers for blocks and workspace that live
    now and at most.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.blocks, self.live_bytes, self.peak_bytes = (
            0,
            {"VRAM": 0, "RAM": 0},
            {"VRAM": 0, "RAM": 0},
        )
        compute, allocate = wan.WanTransformer._run_block, arena.Ledger.allocate

        def run_block(model: wan.WanTransformer, *arguments: Any) -> None:
            self.blocks += 1
            compute(model, *arguments)

        def counted(
            ledger: arena.Ledger, label: str, nbytes: int, device: torch.device
        ) -> torch.Tensor:
            buffer = allocate(ledger, label, nbytes, device)
            self._change(ledger.name, nbytes)
            weakref.finalize(buffer.untyped_storage(), self._change, ledger.name, -nbytes)
            return buffer

        patch.setattr(wan.WanTransformer, "_run_block", run_block)
        patch.setattr(arena.Ledger, "allocate", counted)

    def _change(self, budget: str, nbytes: int) -> None:
        self.live_bytes[budget] += nbytes
        self.peak_bytes[budget] = max(self.peak_bytes[budget], self.live_bytes[budget])


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [CHOICE, PlanChoice(64, 1, 1, 1, True, pinned_blocks=1)],
    ids=["streamed", "one resident, shared visits"],
)
def test_p16_another_program_takes_the_ram_in_the_middle_of_a_step(
    pipeline: StagedPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    choice: PlanChoice,
) -> None:
    """In front of any block: cached blocks are handed back there and then, no block is computed
    twice, and no bit changes.
    """
    asked = request(pipeline, num_frames=1)
    plan = plan_of(pipeline, asked, choice)

    def latents() -> str:
        with torch.no_grad():
            return digest(pipeline.latents(pipeline.new_run(asked, plan)))

    monkeypatch.setattr(recovery, "FREE_RAM_PERIOD_S", 0.0)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        whole = latents()
        blocks, peak_bytes = counted.blocks, counted.peak_bytes
    visits = blocks // 2 if choice.joint_guidance else blocks
    assert visits == 3 * 2 * (1 if choice.joint_guidance else 2)
    for low in (0, 1, 2, visits // 2 + 1, visits - 1):
        readings: list[int] = []

        def host(low: int = low, readings: list[int] = readings) -> HostMemory:
            readings.append(len(readings))
            return HostMemory(16 * 2**30, 2**20 if readings[-1] == low else 8 * 2**30, "machine")

        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(recovery, "host_memory", host)
            counted = Counted(patch)
            assert latents() == whole, low
        assert counted.blocks == blocks, "no block is computed twice"
        assert counted.peak_bytes == peak_bytes, (
            "old slots and blocks are gone before new ones are made"
        )
        assert not any(counted.live_bytes.values())
        (said,) = [record.getMessage() for record in caplog.records]
        kept = choice.host_blocks // 2
        assert (
            f"keeping {kept} blocks in RAM instead of {choice.host_blocks}"
            if kept
            else "reading every block from the disk"
        ) in said
        assert len(readings) == (visits if kept else low + 1), (
            "looked at between all blocks while any is kept"
        )
        assert not lowvram_threads()


def test_free_ram_is_not_looked_at_more_often_than_the_period(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[float] = []
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.5  # a block takes this long
        return clock[0]

    def host() -> HostMemory:
        readings.append(clock[0])
        return HostMemory(16 * 2**30, 8 * 2**30, "machine")

    monkeypatch.setattr(recovery, "monotonic", now)
    monkeypatch.setattr(recovery, "host_memory", host)
    asked = request(pipeline)
    pipeline.generate(asked, plan=plan_of(pipeline, asked, CHOICE))
    assert recovery.FREE_RAM_PERIOD_S == 2.0
    assert len(readings) >= 2
    assert all(2.0 <= after - before <= 3.0 for before, after in pairwise(readings))


def test_a_view_that_was_closed_holds_no_slot(store: Store) -> None:
    from lowvram.streaming.block import BlockView

    slot = torch.zeros(64, dtype=torch.uint8)
    gone = weakref.ref(slot.untyped_storage())
    view = BlockView(slot, {"a": (torch.uint8, (4,), 0)})
    del slot
    view.close()
    assert gone() is None
    with pytest.raises(RuntimeError):
        view["a"]
