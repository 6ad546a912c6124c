"""The models: architecture, defaults and what each is conditioned on. Imports neither torch nor
Triton.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowvram.errors import UsageError

EXPERTS = ("high_noise", "low_noise")
COMPONENTS = (*EXPERTS, "text_encoder", "vae")


@dataclass(frozen=True)
class DiTConfig:
    """One expert (spec section 2). `ffn_dim` and `dim` are multiples of 256 wherever a rotated
    format is used.
    """

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
            raise UsageError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width"
            )

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
    """The Wan2.1 VAE (spec section 4); `latents_mean` and `latents_std` are those of the official
    model.
    """

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
        """Inverse of `to_dict`, from parsed JSON. Raises `UsageError` on unknown or missing
        keys.
        """
        try:
            dit, vae = dict(data["dit"]), dict(data["vae"])
            for owner, key in (
                (dit, "patch_size"),
                (vae, "dim_mult"),
                (vae, "temporal_downsample"),
            ):
                owner[key] = tuple(owner[key])
            text = TextEncoderConfig(**data["text_encoder"])
            return cls(
                data["variant"],
                DiTConfig(**dit),
                text,
                VAEConfig(**vae),
                SamplingDefaults(**data["sampling"]),
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"not a lowvram model description: {error}") from error


@dataclass(frozen=True)
class Variant:
    """One model of the family: a row of `VARIANTS` is all that a new one needs.

    conditioning: what it takes beside the prompt, "none" or "image"; note: what tables of plans
    say about it.
    """

    config: ModelConfig
    conditioning: str = "none"
    note: str = ""


T2V_A14B = ModelConfig("t2v-a14b", DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40))
# Image to video: 16 channels of noise, 4 of mask and 16 of the image (spec sections 1 and 6.1).
# Planned, not yet generated.
I2V_A14B = ModelConfig(
    "i2v-a14b",
    DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36),
    sampling=SamplingDefaults(shift=5.0, guidance_high=3.5, guidance_low=3.5, boundary=0.9),
)
_ONLY_PLANNED = (
    "image to video can be planned but not run yet; encoding the image is not counted, neither its "
    "time nor its memory"
)
VARIANTS = {
    variant.config.variant: variant
    for variant in (Variant(T2V_A14B), Variant(I2V_A14B, "image", _ONLY_PLANNED))
}
