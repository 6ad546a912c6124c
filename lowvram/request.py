"""One video: its request, the shape of its latents, and its workload for planner and timing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowvram.errors import UsageError
from lowvram.formats import FORMATS, Format
from lowvram.units import shown
from lowvram.variants import EXPERTS, ModelConfig, SamplingDefaults

# The text that the official code uses where the user gives no negative prompt (Wan2.2
# `shared_config.py`).
MAX_PROMPT_CHARACTERS = 20_000
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
SOLVERS = ("unipc", "euler")
NOISE_DEVICES = ("cpu", "cuda")
MAX_STEPS = 1000  # timesteps that Wan2.2 was trained on: more steps would repeat some of them
_DEFAULTS = SamplingDefaults()


@dataclass(frozen=True)
class Request:
    """A request for one video. Defaults of guidance, shift and steps are the official ones;
    `guidance_high` belongs to the high-noise expert. refine_steps: how many of the last steps
    quantize activations to two codes instead of one, with attention's values in fp16 (int8 formats
    alone); noise_device: where the seed's noise is drawn, cpu or cuda.
    """

    prompt: str
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    width: int = _DEFAULTS.width
    height: int = _DEFAULTS.height
    num_frames: int = _DEFAULTS.num_frames
    fps: int = _DEFAULTS.fps
    steps: int = _DEFAULTS.steps
    shift: float = _DEFAULTS.shift
    guidance_high: float = _DEFAULTS.guidance_high
    guidance_low: float = _DEFAULTS.guidance_low
    boundary: float = _DEFAULTS.boundary
    seed: int = 0
    solver: str = "unipc"
    refine_steps: int = 0
    noise_device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "solver", "noise_device"):
            _check_text(name, getattr(self, name))
        for name in ("fps", "seed"):
            _check_integer(name, getattr(self, name))
        for name in ("shift", "guidance_high", "guidance_low", "boundary"):
            _check_number(name, getattr(self, name))
        check_clip(self.width, self.height, self.num_frames, self.steps)
        if self.fps < 1:
            raise UsageError(f"fps {self.fps} is less than 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is outside 0 .. 2^63-1")
        check_refine_steps(self.refine_steps, self.steps)
        if self.solver not in SOLVERS:
            raise UsageError(f"unknown solver {self.solver!r}: use one of {', '.join(SOLVERS)}")
        if self.noise_device not in NOISE_DEVICES:
            raise UsageError(f"noise_device is {shown(self.noise_device)}: use cpu or cuda")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise UsageError(f"shift {self.shift} is not a positive number")
        for name in ("guidance_high", "guidance_low"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} {getattr(self, name)} is not a finite number")
        if not 0 <= self.boundary <= 1:
            raise UsageError(f"boundary {self.boundary} is outside 0 .. 1")

    def guidance(self, expert: str) -> float:
        """Guidance scale of `high_noise` or `low_noise`."""
        return self.guidance_high if expert == EXPERTS[0] else self.guidance_low

    def refines(self, step: int) -> bool:
        """Whether step `step` of 0 .. steps is one of the last `refine_steps`."""
        return step >= self.steps - self.refine_steps

    def branches(self, expert: str) -> int:
        """Forwards per step: 2 with guidance, 1 at guidance 1 (the positive prompt alone)."""
        return 1 if self.guidance(expert) == 1 else 2


def check_clip(width: int, height: int, num_frames: int, steps: int) -> None:
    """Check a clip's size and steps: width and height multiples of 16, frames 4n+1, steps 1 to
    `MAX_STEPS`. Raises `UsageError`.
    """
    for name, value in (
        ("width", width),
        ("height", height),
        ("frames", num_frames),
        ("steps", steps),
    ):
        _check_integer(name, value)
    for name, value in (("width", width), ("height", height)):
        if value <= 0 or value % 16:
            near = max(16, (value + 8) // 16 * 16)
            raise UsageError(f"{name} {value} is not a positive multiple of 16: use {near}")
    if num_frames < 1 or num_frames % 4 != 1:
        near = max(1, (num_frames + 1) // 4 * 4 + 1)
        raise UsageError(f"frames {num_frames} is not 4n+1: use {near}")
    if steps < 1:
        raise UsageError(f"steps {steps} is less than 1")
    if steps > MAX_STEPS:
        raise UsageError(
            f"steps {steps} is more than the {MAX_STEPS} timesteps that the model knows: use "
            f"{MAX_STEPS} at most"
        )


def check_refine_steps(refine_steps: int, steps: int) -> None:
    """Check the number of refined steps. Raises `UsageError`."""
    _check_integer("refine_steps", refine_steps)
    if not 0 <= refine_steps <= steps:
        raise UsageError(
            f"refine_steps {refine_steps} is outside 0 .. {steps}, the number of steps"
        )


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 64:
        raise UsageError(f"{name} is {shown(value)}: expected an integer")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, float) and (
        not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 64
    ):
        raise UsageError(f"{name} is {shown(value)}: expected a number")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}: expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} holds {shown(value[error.start])} at character {error.start + 1}: "
            f"expected Unicode text"
        ) from error


@dataclass(frozen=True)
class LatentShape:
    """Shape of a clip's latents [channels, frames, height, width], and the DiT's token grid over
    them.
    """

    channels: int
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the DiT."""
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width)."""
        return (self.channels, self.frames, self.height, self.width)


def latent_shape(config: ModelConfig, width: int, height: int, num_frames: int) -> LatentShape:
    """The latents of a clip in pixels. Raises `UsageError` if the size is no multiple of the VAE's
    stride times the DiT's patch.
    """
    pt, ph, pw = config.dit.patch_size
    stride = config.vae.spatial_stride
    if height % (stride * ph) or width % (stride * pw):
        raise UsageError(f"size {width}x{height} is not a multiple of {stride * pw}x{stride * ph}")
    frames = (num_frames - 1) // config.vae.temporal_stride + 1
    h, w = height // stride, width // stride
    return LatentShape(config.vae.z_dim, frames, h, w, (frames // pt, h // ph, w // pw))


@dataclass(frozen=True)
class Workload:
    """One video on one model: the input of the memory plan and of its predicted time.

    format: of the experts' linears; branches: forwards per step of the high- and the low-noise
    expert; refine_steps: as in `Request`.
    """

    config: ModelConfig
    format: Format
    width: int
    height: int
    num_frames: int
    steps: int
    shift: float
    boundary: float
    branches: tuple[int, int] = (2, 2)
    refine_steps: int = 0

    def __post_init__(self) -> None:
        if self.refine_steps and self.format.weights != "I8":
            raise UsageError(
                f"refine_steps {self.refine_steps} refines int8 activations, and this model is in "
                f"{self.format.name}: use 0"
            )

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        format: str,
        size: tuple[int, int] | None = None,
        num_frames: int | None = None,
        steps: int | None = None,
        refine_steps: int = 0,
    ) -> Workload:
        """A video with the model's defaults for arguments that are None. size: (width, height) in
        pixels.

        Raises `UsageError` for an unknown format, for a clip that no request accepts and for
        refined steps in a format that is not int8.
        """
        if format not in FORMATS:
            raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
        defaults = config.sampling
        width, height = size or (defaults.width, defaults.height)
        num_frames = defaults.num_frames if num_frames is None else num_frames
        steps = defaults.steps if steps is None else steps
        check_clip(width, height, num_frames, steps)
        check_refine_steps(refine_steps, steps)
        return cls(
            config,
            FORMATS[format],
            width,
            height,
            num_frames,
            steps,
            defaults.shift,
            defaults.boundary,
            refine_steps=refine_steps,
        )

    @classmethod
    def of_request(cls, config: ModelConfig, format: str, request: Request) -> Workload:
        """The workload of a request on a store of this model and format."""
        high, low = (request.branches(expert) for expert in EXPERTS)
        return cls(
            config,
            FORMATS[format],
            request.width,
            request.height,
            request.num_frames,
            request.steps,
            request.shift,
            request.boundary,
            (high, low),
            request.refine_steps,
        )

    @cached_property
    def latents(self) -> LatentShape:
        """The clip's latents. Raises `UsageError` if the size is no multiple of the VAE's stride
        times the DiT's patch.
        """
        return latent_shape(self.config, self.width, self.height, self.num_frames)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the DiT."""
        return self.latents.num_tokens

    @property
    def guided(self) -> bool:
        """Whether any step runs a second, negative branch."""
        return 2 in self.branches
