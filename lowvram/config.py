"""Frozen descriptions of the models, of one request and of the budgets. Imports neither torch nor Triton."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowvram.errors import UsageError

# The text that the official code uses where the user gives no negative prompt (Wan2.2 `shared_config.py`).
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
EXPERTS = ("high_noise", "low_noise")
COMPONENTS = (*EXPERTS, "text_encoder", "vae")
FORMATS = ("int8", "int8-plain", "fp8", "bf16", "fp32")
SOLVERS = ("unipc", "euler")
MAX_STEPS = 1000  # timesteps that Wan2.2 was trained on: more steps would repeat some of them


@dataclass(frozen=True)
class DiTConfig:
    """One expert (spec section 2). `ffn_dim` and `dim` are multiples of 256 wherever a rotated format is used."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(f"dim {self.dim} does not split into {self.num_heads} heads of an even width")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class TextEncoderConfig:
    """The UMT5 encoder (spec section 3)."""

    vocab_size: int = 256384
    d_model: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """The Wan2.1 VAE (spec section 4); `latents_mean` and `latents_std` are those of the official model."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def spatial_stride(self) -> int:
        return int(2 ** len(self.temporal_downsample))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request uses where the user says nothing (spec section 1)."""

    width: int = 1280
    height: int = 720
    num_frames: int = 81
    fps: int = 16
    steps: int = 40
    shift: float = 12.0
    guidance_high: float = 4.0
    guidance_low: float = 3.0
    boundary: float = 0.875


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: what the store's manifest keeps and what the planner needs."""

    variant: str
    dit: DiTConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`, from parsed JSON. Raises `UsageError` on unknown or missing keys."""
        try:
            dit, vae = dict(data["dit"]), dict(data["vae"])
            for owner, key in ((dit, "patch_size"), (vae, "dim_mult"), (vae, "temporal_downsample")):
                owner[key] = tuple(owner[key])
            text = TextEncoderConfig(**data["text_encoder"])
            return cls(data["variant"], DiTConfig(**dit), text, VAEConfig(**vae), SamplingDefaults(**data["sampling"]))
        except (KeyError, TypeError) as error:
            raise UsageError(f"not a lowvram model description: {error}") from error


T2V_A14B = ModelConfig("t2v-a14b", DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40))
# Image to video: 16 channels of noise, 4 of mask and 16 of the image (spec sections 1 and 6.1). Planned, not yet generated.
I2V_A14B = ModelConfig(
    "i2v-a14b",
    DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36),
    sampling=SamplingDefaults(shift=5.0, guidance_high=3.5, guidance_low=3.5, boundary=0.9),
)
VARIANTS = {config.variant: config for config in (T2V_A14B, I2V_A14B)}


@dataclass(frozen=True)
class Request:
    """One video. Guidance, shift and steps are those of the official code; `guidance_high` goes with the high-noise expert."""

    prompt: str
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    width: int = 1280
    height: int = 720
    num_frames: int = 81
    fps: int = 16
    steps: int = 40
    shift: float = 12.0
    guidance_high: float = 4.0
    guidance_low: float = 3.0
    boundary: float = 0.875
    seed: int = 0
    solver: str = "unipc"

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "solver"):
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
        if self.solver not in SOLVERS:
            raise UsageError(f"unknown solver {self.solver!r}: use one of {', '.join(SOLVERS)}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise UsageError(f"shift {self.shift} is not a positive number")
        for name in ("guidance_high", "guidance_low"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} {getattr(self, name)} is not a finite number")
        if not 0 <= self.boundary <= 1:
            raise UsageError(f"boundary {self.boundary} is outside 0 .. 1")


def check_clip(width: int, height: int, num_frames: int, steps: int) -> None:
    """What a request and a plan both ask: sizes are multiples of 16, frames 4n+1, steps 1 to `MAX_STEPS`. Raises `UsageError`."""
    for name, value in (("width", width), ("height", height), ("frames", num_frames), ("steps", steps)):
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
        raise UsageError(f"steps {steps} is more than the {MAX_STEPS} timesteps that the model knows: use {MAX_STEPS} at most")


def shown(value: object) -> str:
    """`value` for an error message: its repr, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:80]


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 64:
        raise UsageError(f"{name} is {shown(value)}: expected an integer")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, float) and (not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 64):
        raise UsageError(f"{name} is {shown(value)}: expected a number")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}: expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} holds {shown(value[error.start])} at character {error.start + 1}: expected Unicode text") from error


@dataclass(frozen=True)
class LatentShape:
    """Latents `[channels, frames, height, width]` of one clip and the DiT's token grid over them."""

    channels: int
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.channels, self.frames, self.height, self.width)


def latent_shape(config: ModelConfig, width: int, height: int, num_frames: int) -> LatentShape:
    """Raises `UsageError` where the size does not divide into the VAE's cells and the DiT's patches."""
    pt, ph, pw = config.dit.patch_size
    stride = config.vae.spatial_stride
    if height % (stride * ph) or width % (stride * pw):
        raise UsageError(f"size {width}x{height} is not a multiple of {stride * pw}x{stride * ph}")
    frames = (num_frames - 1) // config.vae.temporal_stride + 1
    h, w = height // stride, width // stride
    return LatentShape(config.vae.z_dim, frames, h, w, (frames // pt, h // ph, w // pw))


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """`8GiB`, `8GB`, `8192MiB` or a plain number of bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"cannot read the amount of memory {text!r}: write it like 8GiB, 8GB or 8192MiB")
    amount = float(match[1]) * unit
    if amount >= 2**63:
        raise UsageError(f"an amount of memory of {text[:80]!r} is more than any machine has: write it like 8GiB")
    return int(amount)


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` (`*` is accepted for `x`), in pixels. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX*]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"cannot read the size {text!r}: write it like 832x480")
    return int(match[1]), int(match[2])


def clip_size(size: str | Sequence[int]) -> tuple[int, int]:
    """(width, height) of `WIDTHxHEIGHT` or of a pair, whose numbers `check_clip` judges. Raises `UsageError`."""
    if isinstance(size, str):
        return parse_size(size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise UsageError(f"size is {shown(size)}: expected (width, height) or text like 832x480")
    return size[0], size[1]


def format_bytes(count: float) -> str:
    """Bytes for people, in decimal units: `14.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
