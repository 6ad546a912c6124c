"""From a prompt to frames, as phases that each hand their memory back before the next begins."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowvram.checkpoint.store import Store, open_store
from lowvram.checkpoint.tensors import TORCH_DTYPES
from lowvram.config import DEFAULT_NEGATIVE_PROMPT, EXPERTS, LatentShape, Request, format_bytes, latent_shape
from lowvram.errors import CheckpointError, OutOfMemoryError, UsageError
from lowvram.memory.arena import Arena, Ledger, hand_back, is_out_of_memory, short_budget
from lowvram.memory.heap import return_freed_memory, trim_heap
from lowvram.memory.ladder import RAM, Ladder
from lowvram.memory.limits import host_memory
from lowvram.memory.plan import Choice, Host, MemoryPlan, choose_plan, describe_plan
from lowvram.memory.profile import MachineProfile
from lowvram.models.text_encoder import TextEncoder
from lowvram.models.vae import WanVAE
from lowvram.models.wan import WanTransformer, compute_dtype, condition, load_ends
from lowvram.progress import Listener, PhaseClock, silent
from lowvram.prompt import Tokenizer
from lowvram.prompt_cache import PromptCache, features_key
from lowvram.sampling.denoise import Expert, block_schedule, branches_of, denoise
from lowvram.sampling.schedule import Schedule, make_schedule
from lowvram.sampling.solvers import Solver, make_solver
from lowvram.sampling.state import RunState, load_state, save_state
from lowvram.streaming.forecast import Forecast
from lowvram.streaming.ring import Slots
from lowvram.streaming.source import BlockFile
from lowvram.streaming.streamer import StreamedComponent, Streamer
from lowvram.streaming.transport import Transport, make_transport
from lowvram.streaming.visits import BlockId, assign_slots
from lowvram.video import clip_metadata, to_uint8, write_video

MAX_PROMPT_CHARACTERS = 20_000
LOW_RAM_BYTES = 256 * 2**20  # with less than this free on the machine, a run hands back the blocks that it keeps in RAM
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Video:
    """frames: [F, H, W, 3] uint8; `peak_bytes` are what the ledgers counted, by budget."""

    frames: Tensor
    request: Request
    model: str
    peak_bytes: dict[str, int]

    def save(self, path: str | Path, *, overwrite: bool = False, scale: int = 1) -> None:
        """H.264 in mp4, whose metadata holds the whole request. Raises `OutputError` where the file exists and `overwrite` is not set."""
        metadata = clip_metadata(self.request, self.model)
        write_video(Path(path), iter(self.frames), self.request.fps, metadata, overwrite=overwrite, scale=scale)


def draw_noise(shape: LatentShape, seed: int) -> Tensor:
    """[C, T, h, w] float32 from the CPU's generator, so that a seed means the same on every machine."""
    return torch.randn(shape.shape, generator=torch.Generator().manual_seed(seed))


class Pipeline:
    """A store, a device and two budgets. `generate` runs one request under a `MemoryPlan`.

    On a CPU the VRAM budget bounds the loop's workspace, which then lies in host memory beside the RAM budget.
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
        """profile: this machine's speeds, by which plans are chosen and their time predicted; None where they were not measured.

        prompt_cache: where prompts' features are kept between runs; None keeps none.
        """
        self.prompt_cache = prompt_cache
        self.store = store
        self.profile = profile
        self.device = device
        self.vram_bytes, self.ram_bytes = vram_bytes, ram_bytes
        self.host = Host.of(device.type, process_bytes)
        self.model = hashlib.sha256((store.path / "lowvram.json").read_bytes()).hexdigest()

    def plan(self, request: Request) -> MemoryPlan:
        """Raises `BudgetError` naming the smallest budgets that would do, `UsageError` for an impossible size."""
        config, profile, branches = self.store.config, self.profile, [branches_of(expert, request) for expert in EXPERTS]
        clock = None
        if profile is not None:
            steps, shift, boundary = request.steps, request.shift, request.boundary
            clock = Forecast(config, self.store.format, profile, steps, shift, boundary, (branches[0], branches[1]))
        return choose_plan(
            config,
            self.store.format,
            (request.width, request.height),
            request.num_frames,
            request.steps,
            self.host,
            self.vram_bytes,
            self.ram_bytes,
            guided=2 in branches,
            clock=clock,
            pinned_limit_bytes=profile.pinned_limit_bytes if profile else None,
        )

    def request(self, prompt: str, **changes: Any) -> Request:
        """A request with this model's defaults; `changes` are fields of `Request`, `size=(width, height)` and `frames` among them.

        Raises `UsageError` for unknown fields and impossible values.
        """
        values = asdict(self.store.config.sampling) | {name: value for name, value in changes.items() if value is not None}
        if "size" in values:
            values["width"], values["height"] = values.pop("size")
        if "frames" in values:
            values["num_frames"] = values.pop("frames")
        if not values.get("negative_prompt"):
            values["negative_prompt"] = DEFAULT_NEGATIVE_PROMPT
        unknown = sorted(set(values) - {field.name for field in fields(Request)})
        if unknown:
            raise UsageError(f"unknown setting {', '.join(unknown)}: use {', '.join(field.name for field in fields(Request))}")
        if not prompt.strip():
            raise UsageError("the prompt is empty: say what the video shows")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise UsageError(f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are read")
        return Request(prompt=prompt, **values)

    def __call__(self, prompt: str, **settings: Any) -> Video:
        """`pipe(prompt="…", seed=0, size=(832, 480), frames=81)`: one video with this model's defaults."""
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
        """state_file: where latents and solver are kept after each step; `resume` continues from it and ends in the same bits.

        noise: [C, T, h, w] float32 instead of the seed's. Raises `LowvramError`s only, and `KeyboardInterrupt`.
        """
        plan = plan or self.plan(request)
        return_freed_memory()
        ledgers = {"vram": Ledger("VRAM", plan.peak_vram_bytes), "ram": Ledger("RAM", plan.peak_ram_bytes)}
        ledgers["vram"].charge("the driver's context", self.host.context_bytes)
        ledgers["ram"].charge("the process", self.host.process_bytes)
        latents = self._latents(request, plan, ledgers, noise, state_file, resume, listener)
        frames = self._with_memory("decode", plan, lambda: self._decode(latents, plan, ledgers, listener))
        return Video(frames, request, self.model, {name: ledger.peak_bytes for name, ledger in ledgers.items()})

    def _latents(
        self,
        request: Request,
        plan: MemoryPlan,
        ledgers: dict[str, Ledger],
        noise: Tensor | None,
        state_file: Path | None,
        resume: bool,
        listener: Listener,
    ) -> Tensor:
        """Text, conditioning and the denoising loop: the clean latents."""
        shape = latent_shape(self.store.config, request.width, request.height, request.num_frames)
        schedule = make_schedule(request.solver, request.steps, request.shift)
        solver = make_solver(request.solver, schedule)
        latents = (draw_noise(shape, request.seed) if noise is None else noise).to(self.device, torch.float32)
        if tuple(latents.shape) != shape.shape:
            raise UsageError(f"noise of shape {list(latents.shape)} does not fit latents of {list(shape.shape)}")
        if resume and state_file is not None:
            state = load_state(state_file, request, self.model)
            solver.load_state_dict({name: value.to(self.device) if value.ndim else value for name, value in state.solver.items()})
            latents = state.latents.to(self.device)
            del state
        if solver.index == schedule.steps:
            return latents
        features = self._with_memory("text", plan, lambda: self._encode_prompts(request, ledgers, plan, listener))
        experts = self._with_memory("conditioning", plan, lambda: self._condition(request, schedule, features, listener))
        clock = PhaseClock(listener, "denoise", schedule.steps, solver.index)

        def on_step(finished: int, current: Tensor) -> None:
            if state_file is not None:
                save_state(state_file, RunState(request, self.model, finished, current, solver.state_dict()))
            clock.report(finished)

        return self._denoise(request, plan, ledgers, experts, schedule, solver, latents, on_step)

    def _denoise(
        self,
        request: Request,
        plan: MemoryPlan,
        ledgers: dict[str, Ledger],
        experts: dict[str, Expert],
        schedule: Schedule,
        solver: Solver,
        latents: Tensor,
        on_step: Callable[[int, Tensor], None],
    ) -> Tensor:
        """The loop; where memory that the plan counts on is gone, with less of it from the last finished step on, down the ladder."""
        ladder = Ladder(plan, lambda choice: self._describe(request, choice), shared=self.device.type == "cpu")
        state = solver.state_dict()
        hand_back(self.device)

        def keep(finished: int, current: Tensor) -> None:
            nonlocal latents, state
            latents, state = current, solver.state_dict()
            on_step(finished, current)
            if finished < schedule.steps and ladder.plan.choice.host_blocks and host_memory().free_bytes < LOW_RAM_BYTES:
                raise OutOfMemoryError(f"less than {format_bytes(LOW_RAM_BYTES)} of RAM is free on this machine", RAM)

        while True:
            try:
                return self._attempt(request, ladder.plan, ledgers, experts, schedule, solver, latents, keep)
            except (OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                short, failure = short_budget(error), str(error).splitlines()[0] if str(error) else type(error).__name__
            hand_back(self.device)  # outside the handler: the exception held the frames, and they the memory
            solver.load_state_dict(state)
            rung = ladder.down(short)
            if rung is None:
                raise self._exhausted(f"step {solver.index + 1} of {schedule.steps}", ladder.plan, short, failure)
            _log.warning(
                "out of %s in step %d of %d (%s): going on from step %d with %s; the video stays the same",
                short, solver.index + 1, schedule.steps, failure, solver.index, rung.gives_up,
            )  # fmt: skip
            ledgers["vram"].limit_bytes, ledgers["ram"].limit_bytes = rung.plan.peak_vram_bytes, rung.plan.peak_ram_bytes

    def _attempt(
        self,
        request: Request,
        plan: MemoryPlan,
        ledgers: dict[str, Ledger],
        experts: dict[str, Expert],
        schedule: Schedule,
        solver: Solver,
        latents: Tensor,
        on_step: Callable[[int, Tensor], None],
    ) -> Tensor:
        """The loop's remaining steps under one plan; its memory is handed back however it ends."""
        shape = latent_shape(self.store.config, request.width, request.height, request.num_frames)
        choice = plan.choice
        blocks = block_schedule(schedule, request, plan.num_blocks, choice.joint_guidance, solver.index)
        counts = choice.resident_blocks, choice.ring_slots, choice.host_blocks, plan.staging_buffers, choice.pinned_blocks
        with self._streamer(blocks, ledgers, plan.slot_bytes, *counts) as streamer, ExitStack() as stack:
            arena = Arena(plan.workspace, ledgers["vram"], self.device)
            stack.callback(arena.close)
            model = WanTransformer(self.store.config.dit, self.store.format, shape, choice, arena, self.device)
            return denoise(model, experts, streamer, schedule, solver, request, latents, on_step)

    def _describe(self, request: Request, choice: Choice) -> MemoryPlan:
        size = (request.width, request.height)
        return describe_plan(self.store.config, self.store.format, size, request.num_frames, request.steps, choice, self.host)

    def _with_memory(self, phase: str, plan: MemoryPlan, run: Callable[[], T]) -> T:
        """`run`, and once more with everything handed back that is not in use where it ran out of memory."""
        hand_back(self.device)  # what the phase before has left in torch's allocator
        for attempt in range(2):
            try:
                return run()
            except (OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                short, failure = short_budget(error), str(error).splitlines()[0] if str(error) else type(error).__name__
            hand_back(self.device)
            if attempt == 0:
                _log.warning("out of %s in the %s phase (%s): trying it once more", short, phase, failure)
        raise self._exhausted(f"the {phase} phase", plan, short, failure)

    def _exhausted(self, where: str, plan: MemoryPlan, short: str, failure: str) -> OutOfMemoryError:
        peak = plan.peak_vram_bytes if short == "VRAM" else plan.peak_ram_bytes
        others = "other programs" if short == RAM or self.device.type == "cpu" else "what else uses the GPU"
        return OutOfMemoryError(
            f"out of {short} in {where} ({failure}): a run that gives up everything it can needs {format_bytes(peak)} of {short}; "
            f"close {others} and go on with --resume, or pass a smaller --size or fewer --frames",
            short,
        )

    @contextmanager
    def _streamer(
        self,
        schedule: Sequence[BlockId],
        ledgers: dict[str, Ledger],
        slot_bytes: int,
        resident: int,
        ring: int,
        host: int,
        staging: int,
        pinned: int = 0,
    ) -> Iterator[Streamer]:
        """Slots and buffers for one schedule, handed back at the end however it ends.

        host: blocks kept in RAM, the first `pinned` of them page-locked; staging buffers are page-locked wherever the driver allows.
        """
        cpu, transport = torch.device("cpu"), self._transport()
        with ExitStack() as stack:

            def slots(label: str, count: int, ledger: str, device: torch.device) -> Slots:
                made = Slots(label, count, slot_bytes, ledgers[ledger], device)
                stack.callback(made.close)
                return made

            files = {name: self._streamed(name) for name in sorted({component for component, _ in schedule})}
            for component in files.values():
                stack.callback(component.file.close)
            device_slots = slots("block slot", resident + ring, "vram", self.device)
            stages, cached = slots("staging buffer", staging, "ram", cpu), slots("cached block", host, "ram", cpu)
            stages.pin(staging, transport)
            cached.pin(pinned, transport)
            visits = assign_slots(schedule, resident, ring, host, staging, cached.pinned)
            yield stack.enter_context(Streamer(files, visits, device_slots, cached, stages, transport))

    def _transport(self) -> Transport:
        return make_transport(self.device)

    def _streamed(self, component: str) -> StreamedComponent:
        file = self.store.files[component]
        ranges = [(block.start, block.nbytes) for block in file.blocks]
        tensors = {name: (TORCH_DTYPES[dtype], shape, offset) for name, (dtype, shape, offset) in file.block_tensors.items()}
        return StreamedComponent(BlockFile(file.path, ranges), tensors)

    def _encode_prompts(self, request: Request, ledgers: dict[str, Ledger], plan: MemoryPlan, listener: Listener) -> list[Tensor]:
        """Features of the prompt and the negative prompt, [L, d_model] each, on the host."""
        clock = PhaseClock(listener, "text", 1)
        config, dtype = self.store.config.text_encoder, compute_dtype(self.store.format)
        prompts = self._token_ids(request)
        hashes = self.store.manifest.components["text_encoder"].tensors
        keys = [features_key(hashes, config, ids, dtype, self.device) for ids in prompts]
        shapes = [(len(ids), config.d_model) for ids in prompts]
        cache = self.prompt_cache
        wanted = list(zip(keys, shapes, strict=True))
        features = [None if cache is None else cache.load(key, shape, dtype) for key, shape in wanted]
        missing = [number for number, rows in enumerate(features) if rows is None]
        if missing:
            encoded = self._encode([prompts[number] for number in missing], ledgers, plan)
            for number, rows in zip(missing, encoded, strict=True):
                features[number] = rows
                if cache is not None:
                    cache.save(keys[number], rows)
        clock.report(1)
        return [rows for rows in features if rows is not None]

    def _encode(self, prompts: list[list[int]], ledgers: dict[str, Ledger], plan: MemoryPlan) -> list[Tensor]:
        config, file = self.store.config.text_encoder, self.store.files["text_encoder"]
        encoder = TextEncoder(config, compute_dtype(self.store.format), self.device)
        schedule = [("text_encoder", index) for index in range(config.num_layers)]
        with self._streamer(schedule, ledgers, plan.text_slot_bytes, 0, 2, 0, plan.staging_buffers) as streamer:
            features = encoder.encode(
                prompts, lambda ids: file.read_rows("token_embedding.weight", ids), file.read("norm.weight"), streamer
            )
        return [rows.cpu() for rows in features]

    def _token_ids(self, request: Request) -> list[list[int]]:
        """Ids of the prompt and the negative prompt; a warning for each that is longer than the model reads."""
        tokenizer, limit = Tokenizer(self.store.tokenizer), self.store.config.dit.text_len
        ids = []
        for name, text in _prompts(request).items():
            ids.append(tokenizer.encode(text, limit))
            tokens = tokenizer.length(text)
            if tokens > limit:
                _log.warning("the %s has %d tokens, the model reads %d of them: what follows is cut off", name, tokens, limit)
        del tokenizer
        trim_heap()
        return ids

    def prompt_tokens(self, request: Request) -> dict[str, dict[str, int]]:
        """`tokens` of each prompt, its end included, and how many of them are `kept`: no model reads more than its `text_len`."""
        tokenizer, limit = Tokenizer(self.store.tokenizer), self.store.config.dit.text_len
        counts = {name.replace(" ", "_"): tokenizer.length(text) for name, text in _prompts(request).items()}
        return {name: {"tokens": tokens, "kept": min(tokens, limit)} for name, tokens in counts.items()}

    def _condition(self, request: Request, schedule: Schedule, features: list[Tensor], listener: Listener) -> dict[str, Expert]:
        clock = PhaseClock(listener, "conditioning", len(EXPERTS))
        config, format = self.store.config.dit, self.store.format
        experts = {}
        for number, name in enumerate(EXPERTS):
            read = self.store.files[name].read
            branches = features[: branches_of(name, request)]
            conditioning = condition(read, config, format, schedule.timesteps, branches, self.device)
            experts[name] = Expert(conditioning, load_ends(read, format, self.device))
            clock.report(number + 1)
        return experts

    def _decode(self, latents: Tensor, plan: MemoryPlan, ledgers: dict[str, Ledger], listener: Listener) -> Tensor:
        """[F, H, W, 3] uint8 on the host."""
        file = self.store.files["vae"]
        vae = WanVAE(self.store.config.vae, file.rest, file.read, self.device)
        clock: list[PhaseClock] = []

        def progress(done: int, total: int) -> None:
            if not clock:
                clock.append(PhaseClock(listener, "decode", total))
            clock[0].report(done)

        frames = torch.empty(plan.num_frames, plan.height, plan.width, 3, dtype=torch.uint8)
        for first, top, pixels in vae.decode(latents, plan.vae_tile_pixels, progress):
            _, count, rows, _ = pixels.shape
            frames[first : first + count, top : top + rows] = to_uint8(pixels)
        return frames


def _prompts(request: Request) -> dict[str, str]:
    return {"prompt": request.prompt, "negative prompt": request.negative_prompt}


def load(
    model: str | Path,
    vram: str | int = "auto",
    ram: str | int = "auto",
    device: str = "auto",
    prompt_cache: bool = True,
) -> Pipeline:
    """Opens a quantized model. vram, ram: bytes, or text like `8GiB`, or `auto` for what is free now.

    prompt_cache: whether prompts' features are kept in the user's cache folder, so that a repeated prompt loads no text encoder.

    Raises `CheckpointError` where MODEL is not a store, `UsageError` for a budget or device that cannot be read.
    """
    from lowvram.memory.budget import resolve_budgets
    from lowvram.memory.measure import this_machine

    path = Path(model)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: make it with `lowvram quantize SOURCE {path}`")
    budgets = resolve_budgets(vram, ram, device)
    target = torch.device(budgets.device)
    profile = this_machine(target.type)
    cache = PromptCache() if prompt_cache else None
    return Pipeline(open_store(path), target, budgets.vram_bytes, budgets.ram_bytes, budgets.process_bytes, profile, cache)
