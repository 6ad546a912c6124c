"""In fp32 the streamed models are diffusers' and transformers' models, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lowvram.checkpoint import names
from lowvram.pipeline import draw_noise
from lowvram.planner.phases import PlanChoice
from lowvram.request import latent_shape
from lowvram.sampling.schedule import make_schedule
from lowvram.store.reader import Store
from lowvram.variants import COMPONENTS
from tests.helpers.checkpoints import tiny_weights
from tests.helpers.runs import expert_velocities, pipeline_of, request_of

EVERYTHING = PlanChoice(128, 0, 2, 0, True)
StoreOf = Callable[[str], Store]


def reference_dit(store: Store, expert: str) -> WanTransformer3DModel:
    dit = store.config.dit
    model = WanTransformer3DModel(
        patch_size=dit.patch_size,
        num_attention_heads=dit.num_heads,
        attention_head_dim=dit.head_dim,
        in_channels=dit.in_dim,
        out_channels=dit.out_dim,
        text_dim=dit.text_dim,
        freq_dim=dit.freq_dim,
        ffn_dim=dit.ffn_dim,
        num_layers=dit.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=dit.eps,
    )
    weights = tiny_weights(store.config, expert)
    model.load_state_dict(
        {names.diffusers_dit_from_official(name): value for name, value in weights.items()}
    )
    return model.eval()


def reference_text_encoder(store: Store) -> UMT5EncoderModel:
    text = store.config.text_encoder
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=text.vocab_size,
            d_model=text.d_model,
            d_kv=text.head_dim,
            num_heads=text.num_heads,
            d_ff=text.d_ff,
            num_layers=text.num_layers,
            relative_attention_num_buckets=text.num_buckets,
            dropout_rate=0.0,
            relative_attention_max_distance=text.max_distance,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=text.eps,
        )
    )
    official = tiny_weights(store.config, "text_encoder")
    weights = {
        names.transformers_text_from_official(name): value.float()
        for name, value in official.items()
    }
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    return model.eval()


def reference_vae(store: Store) -> AutoencoderKLWan:
    vae = store.config.vae
    model = AutoencoderKLWan(
        base_dim=vae.base_dim,
        z_dim=vae.z_dim,
        dim_mult=list(vae.dim_mult),
        num_res_blocks=vae.num_res_blocks,
        attn_scales=[],
        temperal_downsample=list(vae.temporal_downsample),
    )
    weights = tiny_weights(store.config, "vae")
    model.load_state_dict(
        {names.diffusers_vae_from_official(name, vae): value for name, value in weights.items()}
    )
    return model.eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("expert", "size", "frames", "timestep"),
    [("high_noise", (64, 64), 9, 937), ("low_noise", (96, 48), 5, 235)],
)
def test_dit_equals_diffusers(
    tiny_store: StoreOf, expert: str, size: tuple[int, int], frames: int, timestep: int
) -> None:
    store = tiny_store("fp32")
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(latent_shape(store.config, *size, frames).shape, generator=generator)
    features = [
        torch.randn(length, store.config.dit.text_dim, generator=generator) for length in (7, 32)
    ]
    actual = expert_velocities(store, expert, size, frames, latents, timestep, features, EVERYTHING)
    model = reference_dit(store, expert)
    for velocity, rows in zip(actual, features, strict=True):
        text = torch.nn.functional.pad(rows, (0, 0, 0, store.config.dit.text_len - len(rows)))
        with torch.no_grad():
            expected = model(latents[None], torch.tensor([timestep]), text[None]).sample[0]
        assert relative_error(velocity, expected) <= 1e-5


def test_text_encoder_equals_transformers(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tiny_store("fp32")
    pipeline = pipeline_of(store)
    request = request_of(pipeline, "a red circle moves left", negative_prompt="blue")
    captured: list[torch.Tensor] = []
    encode = pipeline._encode_prompts

    def capture(*args: Any) -> list[torch.Tensor]:
        captured.extend(encode(*args))
        return captured

    monkeypatch.setattr(pipeline, "_encode_prompts", capture)
    pipeline.generate(request)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=FastTokenizer.from_str(store.tokenizer.decode()), pad_token="<pad>"
    )
    model = reference_text_encoder(store)
    for text, actual in zip((request.prompt, request.negative_prompt), captured, strict=True):
        ids = tokenizer(text, padding="max_length", max_length=32, return_tensors="pt")
        length = int(ids.attention_mask.sum())
        with torch.no_grad():
            expected = model(ids.input_ids, ids.attention_mask).last_hidden_state[0, :length]
        assert relative_error(actual, expected) <= 1e-5


def test_whole_pipeline_equals_diffusers(tiny_store: StoreOf) -> None:
    """Same noise, timesteps and sigmas: decoded frames agree to PSNR >= 60 dB."""
    store = tiny_store("fp32")
    pipeline = pipeline_of(store)
    request = request_of(
        pipeline, "a red circle moves left", negative_prompt="a blue square", steps=6, shift=5.0
    )
    schedule = make_schedule("unipc", request.steps, request.shift)

    class OfficialGrid(UniPCMultistepScheduler):  # type: ignore[misc]  # diffusers has no types
        """diffusers' solver on the official sigmas and timesteps."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
            super().set_timesteps(num_inference_steps, device=device)
            self.sigmas, self.timesteps = schedule.sigmas.clone(), schedule.timesteps.clone()

    reference = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=FastTokenizer.from_str(store.tokenizer.decode()), pad_token="<pad>"
        ),
        text_encoder=reference_text_encoder(store),
        transformer=reference_dit(store, "high_noise"),
        transformer_2=reference_dit(store, "low_noise"),
        vae=reference_vae(store),
        scheduler=OfficialGrid(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=request.shift,
            num_train_timesteps=1000,
        ),
        boundary_ratio=request.boundary,
    )
    reference.set_progress_bar_config(disable=True)
    noise = draw_noise(
        latent_shape(store.config, request.width, request.height, request.num_frames), request.seed
    )
    expected = reference(
        request.prompt,
        request.negative_prompt,
        request.height,
        request.width,
        request.num_frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_high,
        guidance_scale_2=request.guidance_low,
        latents=noise[None],
        max_sequence_length=32,
        output_type="np",
    ).frames[0]
    actual = pipeline.generate(request).frames.numpy()
    expected_bytes = (np.clip(expected, 0, 1) * 255).astype(np.uint8)
    error = np.mean((actual.astype(np.float64) - expected_bytes) ** 2)
    assert actual.std() > 10, "a flat video would agree with anything"
    assert 10 * np.log10(255**2 / max(error, 1e-12)) >= 60


def test_components_are_complete() -> None:
    """The real sizes have the published numbers of tensors."""
    from lowvram.variants import T2V_A14B

    assert len(names.dit_shapes(T2V_A14B.dit)) == 1095
    assert len(names.text_encoder_shapes(T2V_A14B.text_encoder)) == 242
    assert len(names.vae_shapes(T2V_A14B.vae)) == 194
    assert len(COMPONENTS) == 4
