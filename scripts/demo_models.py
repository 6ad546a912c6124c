"""The demo model's networks in diffusers' and transformers' modules, its tokenizer and the folding of its latent statistics."""

from __future__ import annotations

import html
import string

import diffusers.models.autoencoders.autoencoder_kl_wan as wan_vae
import ftfy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from lowvram.config import DEFAULT_NEGATIVE_PROMPT
from lowvram.demo import scenes

TEXT_LEN = 32
PAD, END, START, UNKNOWN = range(4)

VAE_CONFIG = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 3, 3], "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True],
}  # fmt: skip
DIT_CONFIG = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_dim": 256,
    "freq_dim": 256, "ffn_dim": 512, "num_layers": 4, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
}  # fmt: skip
TEXT_CONFIG = {
    "vocab_size": 256, "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 256, "num_layers": 1, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
}  # fmt: skip


def fast_single_frame(module: type[nn.Conv3d]) -> None:
    """A causal 3-D convolution of one frame sees two zero frames before it: only its last time slice counts."""
    whole_clip = module.forward

    def forward(self: nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is None and x.shape[2] == 1 and self.kernel_size[0] == 3 and self._padding[4] == 2:
            return F.conv2d(F.pad(x[:, :, 0], self._padding[:4]), self.weight[:, :, -1], self.bias).unsqueeze(2)
        return whole_clip(self, x, cache_x)

    module.forward = forward


def new_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():
        if isinstance(module, wan_vae.WanResidualBlock):  # residual branches start at zero
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae


def official_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation by which every Wan runtime normalises latents, as [16] each."""
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Maps latents of statistics `mean`, `std` ([16] each) to the official ones, and back before decoding: the same reconstruction."""
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
    for block in dit.blocks:  # residual branches start small, the head at zero
        nn.init.zeros_(block.scale_shift_table)
    nn.init.zeros_(dit.proj_out.weight)
    nn.init.zeros_(dit.proj_out.bias)
    return dit


def new_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(3)
    return UMT5EncoderModel(UMT5Config(**TEXT_CONFIG, use_cache=False, pad_token_id=PAD, eos_token_id=END))


def caption_words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    verbs = ["move", "moves", *scenes.MOTIONS, *(f"{motion}s" for motion in ("grow", "bounce"))]
    return list(dict.fromkeys(["a", "and", "on", "background", *scenes.COLORS, *scenes.GROUNDS, *scenes.SHAPES, *verbs]))


def new_tokenizer() -> Tokenizer:
    """A Unigram tokenizer of the caption words and single letters, with the special ids of UMT5. Punctuation is unknown to it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in caption_words()]
    pieces += [(piece, -12.0) for piece in ("▁", *string.ascii_lowercase)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    return tokenizer


def clean(text: str) -> str:
    """The official cleaning of a prompt before it is tokenised."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def token_ids(texts: list[str]) -> Tensor:
    """[len(texts), TEXT_LEN] int64, padded with 0 on the right."""
    tokenizer = new_tokenizer()
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(pad_id=PAD, length=TEXT_LEN)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch([clean(text) for text in texts])])


def unconditional_ids() -> Tensor:
    """[2, TEXT_LEN]: what stands for no caption, the empty prompt and the default negative prompt."""
    return token_ids(["", DEFAULT_NEGATIVE_PROMPT])


def text_features(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """ids: [B, TEXT_LEN]. Returns [B, TEXT_LEN, d_model] whose rows of padding are zero, as the DiT takes them."""
    mask = ids != PAD
    longest = int(mask.sum(1).max())
    features = encoder(ids[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
    return F.pad(features * mask[:, :longest].unsqueeze(-1), (0, 0, 0, TEXT_LEN - longest))
