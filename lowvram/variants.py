"""Architecture and sampling defaults of the models, one `Variant` each. Imports neither torch nor
Triton.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from lowvram.errors import UsageError

# Types of sizes and numbers in configuration files, which `files.checked` holds them to.
Size = Annotated[int, Meta(ge=1, le=2**20)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Number = Annotated[float, Meta(gt=-1e9, lt=1e9)]
Multipliers = Annotated[tuple[Size, ...], Meta(min_length=1, max_length=16)]
Switches = Annotated[tuple[bool, ...], Meta(min_length=1, max_length=16)]

EXPERTS = ("high_noise", "low_noise")
COMPONENTS = (*EXPERTS, "text_encoder", "vae")


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of one expert (spec section 2). Rotated formats need `dim` and `ffn_dim` in
    multiples of 256.
    """

    dim: Size
    ffn_dim: Size
    num_heads: Size
    num_layers: Layers
    in_dim: Size = 16
    out_dim: Size = 16
    freq_dim: Size = 256
    text_dim: Size = 4096
    text_len: Size = 512
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    eps: Number = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class TextEncoderConfig:
    """The UMT5 encoder (spec section 3)."""

    vocab_size: Size = 256384
    d_model: Size = 4096
    num_heads: Size = 64
    head_dim: Size = 64
    d_ff: Size = 10240
    num_layers: Layers = 24
    num_buckets: Size = 32
    max_distance: Size = 128
    eps: Number = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions of the Wan2.1 VAE (spec section 4)."""

    base_dim: Size = 96
    z_dim: Size = 16
    dim_mult: Multipliers = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Meta(ge=1, le=64)] = 2
    temporal_downsample: Switches = (False, True, True)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell along height and width."""
        return int(2 ** len(self.temporal_downsample))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame, after the first."""
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling parameters of a request for which the user gives none (spec section 1)."""

    width: Size = 1280
    height: Size = 720
    num_frames: Size = 81
    fps: Size = 16
    steps: Size = 40
    shift: Number = 12.0
    guidance_high: Number = 4.0
    guidance_low: Number = 3.0
    boundary: Number = 0.875


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and sampling defaults of a whole model, as stored in a manifest."""

    variant: str
    dit: DiTConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One model of the family; a row of `VARIANTS`.

    conditioning: input beside the prompt, "none" or "image"; note: a remark for tables of plans.
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


def variant_of(
    dit: DiTConfig,
    text_encoder: TextEncoderConfig | None = None,
    vae: VAEConfig | None = None,
) -> Variant | None:
    """The variant with these dimensions, as far as they are given; None for a custom model."""
    for variant in VARIANTS.values():
        config = variant.config
        if (
            dit == config.dit
            and text_encoder in (None, config.text_encoder)
            and vae in (None, config.vae)
        ):
            return variant
    return None
