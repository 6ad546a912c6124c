"""The demo model's networks in diffusers' and transformers' modules, its tokenizer and the folding
of its latent statistics.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.models.autoencoders.autoencoder_kl_wan as wan_vae
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from lowvram.checkpoint.names import (
    official_from_diffusers_dit,
    official_from_diffusers_vae,
    official_from_transformers_text,
)
from lowvram.prompt.tokenizer import clean_prompt
from lowvram.request import DEFAULT_NEGATIVE_PROMPT
from lowvram.variants import VAEConfig

TEXT_LEN = 32
PAD, END, START, UNKNOWN = range(4)

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 3, 3], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}  # fmt: skip
DIT_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 256,
    "freq_dim": 256,
    "ffn_dim": 512,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
TEXT_CONFIG = {
    "vocab_size": 256,
    "d_model": 256,
    "d_kv": 64,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
}

OFFICIAL_CONFIG = {
    "model_type": "t2v",
    "text_len": TEXT_LEN,
    "text_dim": 256,
    "in_dim": 16,
    "dim": 256,
    "ffn_dim": 512,
    "freq_dim": 256,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 4,
    "eps": 1e-6,
}


def resample_clip(layer: wan_vae.WanResample, x: Tensor) -> Tensor:
    """Wan's resampling of a whole clip at once; the first frame stands alone in time. x: [B, C, T,
    H, W].
    """
    first, rest = x[:, :, :1], x[:, :, 1:]
    if layer.mode == "upsample3d" and rest.shape[2]:
        pairs = layer.time_conv(rest).unflatten(1, (2, -1))  # [B, 2, C, T - 1, H, W]
        x = torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def causal_convolution(layer: wan_vae.WanCausalConv3d, x: Tensor) -> Tensor:
    """A single frame sees two zero frames before it: only the kernel's last time slice counts, and
    a 2-D convolution is faster.
    """
    if x.shape[2] == 1 and layer.kernel_size[0] == 3 and layer._padding[4] == 2:
        return F.conv2d(
            F.pad(x[:, :, 0], layer._padding[:4]), layer.weight[:, :, -1], layer.bias
        ).unsqueeze(2)
    return F.conv3d(F.pad(x, layer._padding), layer.weight, layer.bias, layer.stride)


def rms_norm(layer: wan_vae.WanRMS_norm, x: Tensor) -> Tensor:
    inverse = x.float().square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
    scaled: Tensor = x * (inverse * layer.scale * layer.gamma)
    return scaled


def use_whole_clips() -> None:
    """Lets the VAE's encoder and decoder take whole clips instead of chunks with caches: equal
    results, several times faster to train.
    """
    chunked = wan_vae.WanResample.forward, wan_vae.WanCausalConv3d.forward

    def resample(
        self: wan_vae.WanResample,
        x: Tensor,
        feat_cache: list[Any] | None = None,
        feat_idx: list[int] | None = None,
    ) -> Tensor:
        return (
            resample_clip(self, x)
            if feat_cache is None
            else chunked[0](self, x, feat_cache, feat_idx)
        )

    def convolution(
        self: wan_vae.WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None
    ) -> Tensor:
        return (
            causal_convolution(self, x)
            if cache_x is None and self.stride[0] == 1
            else chunked[1](self, x, cache_x)
        )

    wan_vae.WanResample.forward, wan_vae.WanCausalConv3d.forward, wan_vae.WanRMS_norm.forward = (
        resample,
        convolution,
        rms_norm,
    )


def use_float_attention() -> None:
    """Keeps attention in float32 under autocast: on a CPU its backward pass in bfloat16 costs more
    than all the rest.
    """
    attention = F.scaled_dot_product_attention

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return attention(query.float(), key.float(), value.float(), *args, **kwargs)

    F.scaled_dot_product_attention = forward


def encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """clip: [B, 3, 4n + 1, H, W] in -1..1. Returns the latents' means, not normalised."""
    means: Tensor = vae.quant_conv(vae.encoder(clip)).chunk(2, dim=1)[0]
    return means


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    clip: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clip


def new_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():
        if isinstance(module, wan_vae.WanResidualBlock):  # residual branches start at zero
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae


def official_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation by which every Wan runtime normalises latents, as [16]
    each.
    """
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Maps latents of statistics `mean`, `std` ([16] each) to the official ones, and back before
    decoding: the same reconstruction.
    """
    official_mean, official_std = official_statistics(vae)
    scale = official_std / std
    shift = official_mean - mean * scale
    into, back = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    into.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = into.bias[:channels] * scale + shift
    back.bias -= back.weight.flatten(1) @ (shift / scale)
    back.weight /= scale.view(1, -1, 1, 1, 1)


def new_dit() -> WanTransformer3DModel:
    torch.manual_seed(2)
    dit = WanTransformer3DModel(**DIT_CONFIG)
    nn.init.zeros_(dit.proj_out.weight)
    nn.init.zeros_(dit.proj_out.bias)
    for block in dit.blocks:
        nn.init.zeros_(block.scale_shift_table)
        aim_heads(block.attn1)
    find_borders(dit.blocks[0].attn1)
    return dit


@torch.no_grad()
def aim_heads(attention: WanAttention) -> None:
    """Points three of the heads at positions: the same place in every frame, the whole of the same
    frame, and what is near in both.

    RoPE's slow pairs say nothing on a grid of 5x4x4 tokens, and from a plain start such heads take
    thousands of steps to form. Here the two fastest pairs of an axis become a constant in q and k,
    so the logits fall with the distance along that axis.
    """
    width = DIT_CONFIG["attention_head_dim"]
    rows = 2 * (width // 6)
    # first channel of each axis within a head
    axes = {"t": 0, "h": width - 2 * rows, "w": width - rows}
    for head, wanted in enumerate(("hw", "t", "thw")):
        for axis in wanted:
            start = head * width + axes[axis]
            for linear, norm in (
                (attention.to_q, attention.norm_q),
                (attention.to_k, attention.norm_k),
            ):
                linear.weight[start : start + 4] = 0
                linear.bias[start : start + 4] = torch.tensor([1.0, 0.0, 1.0, 0.0])
                norm.weight[start : start + 4] = 3.0


@torch.no_grad()
def find_borders(attention: WanAttention) -> None:
    """Points the four heads at the right, left, lower and upper neighbour of a token; at a border
    they fall back on the token itself.

    RoPE tells distances only, so on pure noise a token learns where it is from nothing but the
    border: there its neighbour is itself.
    """
    width = DIT_CONFIG["attention_head_dim"]
    rows = 2 * (width // 6)
    axes = {"t": (0, width - 2 * rows), "h": (width - 2 * rows, rows), "w": (width - rows, rows)}
    for head, (moved, step) in enumerate((("w", 1), ("w", -1), ("h", 1), ("h", -1))):
        for axis, (first, channels) in axes.items():
            start = head * width + first
            shift = step if axis == moved else 0
            angles = [shift * 10000 ** (-2 * pair / channels) for pair in (0, 1)]
            for linear, norm, turn in (
                (attention.to_q, attention.norm_q, 1),
                (attention.to_k, attention.norm_k, 0),
            ):
                linear.weight[start : start + 4] = 0
                values = [part(turn * angle) for angle in angles for part in (math.cos, math.sin)]
                linear.bias[start : start + 4] = torch.tensor(values)
                norm.weight[start : start + 4] = 6.0


def new_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(3)
    return UMT5EncoderModel(
        UMT5Config(**TEXT_CONFIG, use_cache=False, pad_token_id=PAD, eos_token_id=END)
    )


# Every word a caption holds.
WORDS = [
    "a",
    "and",
    "on",
    "background",
    "red",
    "green",
    "blue",
    "yellow",
    "white",
    "black",
    "gray",
    "circle",
    "square",
    "triangle",
    "move",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "grow",
    "grows",
    "bounce",
    "bounces",
]


def new_tokenizer() -> Tokenizer:
    """A Unigram tokenizer of the caption words and single letters, with the special ids of UMT5.
    Punctuation is unknown to it.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(piece, -12.0) for piece in ("▁", *string.ascii_lowercase)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    return tokenizer


def token_ids(texts: list[str]) -> Tensor:
    """[len(texts), TEXT_LEN] int64, padded with 0 on the right."""
    tokenizer = new_tokenizer()
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(pad_id=PAD, length=TEXT_LEN)
    return torch.tensor(
        [
            encoding.ids
            for encoding in tokenizer.encode_batch([clean_prompt(text) for text in texts])
        ]
    )


def unconditional_ids() -> Tensor:
    """[2, TEXT_LEN]: what stands for no caption, the empty prompt and the default negative
    prompt.
    """
    return token_ids(["", DEFAULT_NEGATIVE_PROMPT])


def text_features(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """ids: [B, TEXT_LEN]. Returns [B, TEXT_LEN, d_model] whose rows of padding are zero, as the DiT
    takes them.
    """
    mask = ids != PAD
    longest = int(mask.sum(1).max())
    features = encoder(ids[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
    return F.pad(features * mask[:, :longest].unsqueeze(-1), (0, 0, 0, TEXT_LEN - longest))


def official_tensors(
    modules: nn.Module, official_name: Callable[[str], str | None]
) -> dict[str, Tensor]:
    """The module's tensors by official name, in bfloat16."""
    tensors = {}
    for name, value in modules.state_dict().items():
        official = official_name(name)
        if official is None:
            raise ValueError(f"{name} has no official name")
        tensors[official] = value.detach().cpu().bfloat16().contiguous()
    return tensors


def write_official(
    root: Path,
    experts: dict[str, nn.Module],
    text: nn.Module,
    vae: nn.Module,
    defaults: dict[str, int | float],
) -> None:
    """The layout of Wan-AI/Wan2.2-T2V-A14B, with `lowvram_defaults.json` beside it."""
    vae_config = VAEConfig(
        VAE_CONFIG["base_dim"], 16, tuple(VAE_CONFIG["dim_mult"]), VAE_CONFIG["num_res_blocks"]
    )
    for name, dit in experts.items():
        folder = root / f"{name}_model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(OFFICIAL_CONFIG, indent=2) + "\n")
        save_file(
            official_tensors(dit, official_from_diffusers_dit),
            folder / "diffusion_pytorch_model.safetensors",
        )
    save_file(
        official_tensors(text, official_from_transformers_text),
        root / "models_t5_umt5-xxl-enc-bf16.safetensors",
    )
    vae_names = partial(official_from_diffusers_vae, config=vae_config)
    save_file(official_tensors(vae, vae_names), root / "Wan2.1_VAE.safetensors")
    tokenizer = root / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text(new_tokenizer().to_str(pretty=True) + "\n")
    (root / "lowvram_defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")
