"""Run requests on a store: text, conditioning, denoising and decoding as phases, each of which
releases its memory at its end.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lowvram_kernels.constraints import refused_gpu
from lowvram_kernels.dispatch import distrusted
from lowvram_kernels.errors import UnsupportedOpError
from torch import Tensor

from lowvram.errors import CheckpointError, UnsupportedError, UsageError
from lowvram.hardware.profile import MachineProfile
from lowvram.memory.cap import vram_cap
from lowvram.memory.malloc import return_freed_memory
from lowvram.memory.out_of_memory import release_cached_memory
from lowvram.memory.turns import only_run
from lowvram.models.numerics import arithmetic, stored_values
from lowvram.models.vae import WanVAE
from lowvram.models.wan import Conditioning, EmbeddingsAndHead, condition, load_embeddings_and_head
from lowvram.planner.choose import choose_plan
from lowvram.planner.phases import Host
from lowvram.planner.plan import MemoryPlan
from lowvram.progress import Listener, PhaseClock, silent
from lowvram.prompt.cache import PromptCache
from lowvram.prompt.encode import prompt_features, prompt_tokens
from lowvram.request import (
    DEFAULT_NEGATIVE_PROMPT,
    MAX_PROMPT_CHARACTERS,
    LatentShape,
    Request,
    Workload,
)
from lowvram.run import Run
from lowvram.sampling.denoise import Expert
from lowvram.sampling.recovery import denoise_within_budgets
from lowvram.sampling.schedule import Schedule, make_schedule
from lowvram.sampling.solvers import Solver, make_solver
from lowvram.sampling.state import RunState, load_state, save_state
from lowvram.store.reader import Store, open_store
from lowvram.streaming.transport import Transport, make_transport
from lowvram.timing.forecast import Forecast
from lowvram.units import clip_size, shown
from lowvram.variants import EXPERTS
from lowvram.video import clip_metadata, to_uint8, write_video

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Video:
    """Decoded frames and how they were made. frames: [F, H, W, 3] uint8; peak_bytes: peaks counted
    by the ledgers, by budget.
    """

    frames: Tensor
    request: Request
    model: str
    peak_bytes: dict[str, int]

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        scale: int = 1,
        metadata: str = "full",
    ) -> None:
        """Write H.264 in mp4. scale: enlarge each pixel this many times; metadata: `full`, with the
        request, or `label`, only that the video is generated.

        Raises `OutputError` if the file exists and `overwrite` is not set, `UsageError` for an
        unknown kind of metadata.
        """
        if metadata not in ("full", "label"):
            raise UsageError(f"metadata is {shown(metadata)}: use full or label")
        facts = clip_metadata(self.request if metadata == "full" else None, self.model)
        write_video(
            Path(path),
            iter(self.frames),
            self.request.fps,
            facts,
            overwrite=overwrite,
            scale=scale,
        )


def draw_noise(shape: LatentShape, seed: int, device: str = "cpu") -> Tensor:
    """Noise [C, T, h, w] float32, on `device`.

    The CPU's generator gives the same noise on every machine, also as ComfyUI; a GPU's gives that
    of the official code on a GPU. Raises `UsageError` for a GPU where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("noise_device is cuda, but torch finds no GPU: use cpu")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape.shape, generator=generator, device=device)


def moved(expert: Expert, device: torch.device) -> Expert:
    """Copy an expert's tensors to `device`, one after the other.

    Copied by way of the host with an empty cache, they are packed into few segments. Made between
    large weights, tensors of a few megabytes would keep segments of hundreds in torch's allocator.
    """
    time, modulation, contexts = expert.conditioning
    copies = [
        tensor.to(device, copy=True) for tensor in (time, modulation, *contexts, *expert.ends)
    ]
    ends = len(copies) - len(expert.ends)
    return Expert(
        Conditioning(copies[0], copies[1], tuple(copies[2:ends])), EmbeddingsAndHead(*copies[ends:])
    )


class Pipeline:
    """A store, a device and two budgets. `generate` runs one request under a `MemoryPlan`.

    On a CPU the VRAM budget bounds the denoising loop's workspace, which is host memory in addition
    to the RAM budget.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        vram_bytes: int,
        ram_bytes: int,
        process_bytes: int,
        profile: MachineProfile | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        """profile: speeds of this machine, for choosing plans and predicting their time; None if
        not measured. prompt_cache: cache of encoded prompts; None for no cache.
        """
        self.prompt_cache = prompt_cache
        self.store = store
        self.profile = profile
        self.device = device
        self.vram_bytes, self.ram_bytes = vram_bytes, ram_bytes
        host = Host.of(device.type, process_bytes)
        self.host = replace(
            host,
            references=host.references or refused_gpu(device) is not None or bool(distrusted()),
            values=stored_values(store.format, device),
        )
        self.model = hashlib.sha256((store.path / "lowvram.json").read_bytes()).hexdigest()

    def plan(self, request: Request) -> MemoryPlan:
        """The memory plan of a request. Raises `BudgetError` with the smallest budgets that work,
        `UsageError` for an impossible size.
        """
        workload, profile = self.workload(request), self.profile
        return choose_plan(
            workload,
            self.host,
            self.vram_bytes,
            self.ram_bytes,
            clock=Forecast(workload, profile) if profile else None,
            pinned_limit_bytes=profile.pinned_limit_bytes if profile else None,
        )

    def workload(self, request: Request) -> Workload:
        """The workload of a request on this model."""
        return Workload.of_request(self.store.config, self.store.format, request)

    def request(self, prompt: str, **changes: Any) -> Request:
        """A request with this model's defaults. changes: fields of `Request`, or `frames` and
        `size` ((width, height) or "832x480").

        Raises `UsageError` for unknown fields and impossible values.
        """
        values = asdict(self.store.config.sampling) | {
            name: value for name, value in changes.items() if value is not None
        }
        if "size" in values:
            values["width"], values["height"] = clip_size(values.pop("size"))
        if "frames" in values:
            values["num_frames"] = values.pop("frames")
        if values.get("negative_prompt") is None:
            values["negative_prompt"] = DEFAULT_NEGATIVE_PROMPT
        unknown = sorted(set(values) - {field.name for field in fields(Request)})
        if unknown:
            raise UsageError(
                f"unknown setting {', '.join(unknown)}: use "
                f"{', '.join(field.name for field in fields(Request))}"
            )
        if not isinstance(prompt, str):
            raise UsageError(f"prompt is {shown(prompt)}: expected text")
        if not prompt.strip():
            raise UsageError("the prompt is empty: say what the video shows")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise UsageError(
                f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are read"
            )
        return Request(prompt=prompt, **values)

    def __call__(self, prompt: str, **settings: Any) -> Video:
        """Generate one video: `pipe(prompt="…", seed=0, size=(832, 480), frames=81)`. settings: as
        in `request`.
        """
        return self.generate(self.request(prompt, **settings))

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        *,
        plan: MemoryPlan | None = None,
        noise: Tensor | None = None,
        state_file: Path | None = None,
        resume: bool = False,
        listener: Listener = silent,
    ) -> Video:
        """Run one request.

        plan: a plan other than the one that `plan` chooses; noise: [C, T, h, w] float32 in place of
        the seed's; state_file: file for latents and solver state, written after each step; resume:
        continue from that file, with the same result. A run of another thread on the same device is
        waited for. Raises `LowvramError`s only, and `KeyboardInterrupt`.
        """
        with only_run(self.device):
            return_freed_memory()
            run = self.new_run(request, plan or self.plan(request), listener)
            # a plan of the caller's own may ask for more
            granted = max(self.vram_bytes, run.plan.peak_vram_bytes)
            try:
                with vram_cap(self.device, granted - self.host.context_bytes):
                    latents = self.latents(run, noise, state_file, resume)
                    frames = run.phase("decode", lambda: self._decode(run, latents))
            except UnsupportedOpError as error:
                raise UnsupportedError(str(error)) from error
            return Video(
                frames,
                request,
                self.model,
                {"vram": run.vram.peak_bytes, "ram": run.ram.peak_bytes},
            )

    def new_run(self, request: Request, plan: MemoryPlan, listener: Listener = silent) -> Run:
        """A run of `request` under `plan` on this pipeline's store and device."""
        return Run(self.store, self.device, self.host, request, plan, listener, self._transport)

    def latents(
        self,
        run: Run,
        noise: Tensor | None = None,
        state_file: Path | None = None,
        resume: bool = False,
    ) -> Tensor:
        """Text, conditioning and denoising: the clean latents, [C, T, h, w] float32 on the device.
        Arguments as in `generate`.
        """
        request, shape = run.request, run.workload.latents
        schedule = make_schedule(request.solver, request.steps, request.shift)
        solver, values = (
            make_solver(request.solver, schedule),
            arithmetic(self.store.format, self.device),
        )

        def begin() -> Tensor:
            return (
                draw_noise(shape, request.seed, request.noise_device) if noise is None else noise
            ).to(self.device, torch.float32)

        latents = run.phase("noise", begin)
        if tuple(latents.shape) != shape.shape:
            raise UsageError(
                f"noise of shape {list(latents.shape)} does not fit latents of {list(shape.shape)}"
            )
        if resume and state_file is not None:
            run.resumable = True
            latents = run.phase(
                "resume", partial(self._load_state, state_file, request, values, solver)
            )
        if solver.index == schedule.steps:
            return latents
        features = run.phase("text", lambda: self._encode_prompts(run))
        experts = run.phase("conditioning", lambda: self._condition(run, schedule, features))
        clock = PhaseClock(run.listener, "denoise", schedule.steps, solver.index)

        def on_step(finished: int, current: Tensor) -> None:
            if state_file is not None:
                save_state(
                    state_file,
                    RunState(request, self.model, values, finished, current, solver.state_dict()),
                )
                run.resumable = True
            clock.report(finished)

        return denoise_within_budgets(run, experts, schedule, solver, latents, on_step)

    def prompt_tokens(self, request: Request) -> dict[str, dict[str, int]]:
        """Token counts of each prompt, the end token included: `tokens`, and `kept` after
        truncation to the model's `text_len`.
        """
        return prompt_tokens(self.store, request)

    def _load_state(self, path: Path, request: Request, values: str, solver: Solver) -> Tensor:
        """Latents of an interrupted run, on the device; sets the solver's state."""
        shape = self.workload(request).latents.shape
        state = load_state(path, request, self.model, values, shape)
        solver.load_state_dict(
            {
                name: value.to(self.device) if value.ndim else value
                for name, value in state.solver.items()
            }
        )
        return state.latents.to(self.device)

    def _transport(self) -> Transport:
        return make_transport(self.device)

    def _encode_prompts(self, run: Run) -> list[Tensor]:
        return prompt_features(run, self.prompt_cache)

    def _condition(self, run: Run, schedule: Schedule, features: list[Tensor]) -> dict[str, Expert]:
        clock = PhaseClock(run.listener, "conditioning", len(EXPERTS))
        config, format = self.store.config.dit, self.store.format
        apart = self.host.rounds
        experts = {}
        for number, name in enumerate(EXPERTS):
            read = self.store.files[name].read
            branches = features[: run.request.branches(name)]
            conditioning = condition(
                read, config, format, schedule.timesteps, branches, self.device
            )
            experts[name] = Expert(
                conditioning, load_embeddings_and_head(read, format, self.device)
            )
            del conditioning
            if apart:
                experts[name] = moved(experts[name], HOST)
                release_cached_memory(self.device)
            clock.report(number + 1)
        return (
            {name: moved(expert, self.device) for name, expert in experts.items()}
            if apart
            else experts
        )

    def _decode(self, run: Run, latents: Tensor) -> Tensor:
        """[F, H, W, 3] uint8 on the host."""
        file, plan = self.store.files["vae"], run.plan
        vae = WanVAE(self.store.config.vae, file.rest, file.read, self.device, run.lean)
        clock: list[PhaseClock] = []

        def progress(done: int, total: int) -> None:
            if not clock:
                clock.append(PhaseClock(run.listener, "decode", total))
            clock[0].report(done)

        clip = run.workload
        frames = torch.empty(clip.num_frames, clip.height, clip.width, 3, dtype=torch.uint8)
        for first, top, pixels in vae.decode(latents, plan.vae_tile_pixels, progress):
            _, count, rows, _ = pixels.shape
            frames[first : first + count, top : top + rows] = to_uint8(pixels)
        return frames


def load(
    model: str | Path,
    vram: str | int = "auto",
    ram: str | int = "auto",
    device: str = "auto",
    prompt_cache: bool = True,
    allow_links: bool = False,
) -> Pipeline:
    """Open a quantized model. vram, ram: bytes, text such as `8GiB`, or `auto` for a share of the
    free memory; prompt_cache: whether to cache encoded prompts on disk; allow_links: follow
    links that point out of the folder.

    Raises `CheckpointError` if `model` is not a store, `UsageError` for an invalid budget or
    device.
    """
    from lowvram.doctor.kernel_check import trust_kernels_before_a_run
    from lowvram.doctor.measure import on_disk_of, this_machine
    from lowvram.hardware.budgets import resolve_budgets

    if not isinstance(model, (str, Path)):
        raise UsageError(f"model is {shown(model)}: expected the folder of a quantized model")
    path = Path(model)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: make it with `lowvram quantize SOURCE {path}`"
        )
    budgets = resolve_budgets(vram, ram, device)
    target = torch.device(budgets.device)
    if target.index is not None:
        torch.cuda.set_device(target)  # what asks for "the" GPU means this one
    trust_kernels_before_a_run(target)
    measured = this_machine(target.type)
    profile = None if measured is None else on_disk_of(path, measured)
    cache = PromptCache() if prompt_cache else None
    pipeline = Pipeline(
        open_store(path, allow_links=allow_links),
        target,
        budgets.vram_bytes,
        budgets.ram_bytes,
        budgets.process_bytes,
        profile,
        cache,
    )
    # Never below what is assumed where nothing is measured: kernels and libraries that load later
    # add to it.
    context = max(pipeline.host.context_bytes, budgets.context_bytes or 0)
    pipeline.host = replace(pipeline.host, context_bytes=context)
    return pipeline
