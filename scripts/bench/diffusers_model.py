"""diffusers' model of A14B's shapes as people run it: bf16 resident, with group offloading,
quantized by optimum-quanto; its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lowvram.request import latent_shape
from lowvram.variants import ModelConfig


def baselines(device: torch.device) -> dict[str, Callable[[Any], None]]:
    """Names of diffusers' providers, and what each does to its model."""
    return {
        "diffusers bf16 resident": lambda model: None,
        "diffusers bf16 group offloading, stream": lambda model: offload(model, device),
        "diffusers optimum-quanto int8": lambda model: quantize_weights(model),
    }


def new_model(config: ModelConfig, device: torch.device) -> Any:
    """One expert with random weights in bf16."""
    from diffusers import WanTransformer3DModel

    dit, before = config.dit, torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return WanTransformer3DModel(
                patch_size=dit.patch_size,
                num_attention_heads=dit.num_heads,
                attention_head_dim=dit.head_dim,
                in_channels=dit.in_dim,
                out_channels=dit.out_dim,
                text_dim=dit.text_dim,
                freq_dim=dit.freq_dim,
                ffn_dim=dit.ffn_dim,
                num_layers=dit.num_layers,
            ).eval()
    finally:
        torch.set_default_dtype(before)


def offload(model: Any, device: torch.device) -> None:
    model.to("cpu")
    model.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
    )


def quantize_weights(model: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


def time_steps(
    model: Any,
    config: ModelConfig,
    size: tuple[int, int],
    frames: int,
    steps: int,
    device: torch.device,
) -> list[float]:
    """Seconds of each step of one expert, with both guidance branches."""
    shape = latent_shape(config, *size, frames)
    latents = torch.randn(1, *shape.shape, device=device, dtype=torch.bfloat16)
    text = torch.randn(
        1, config.dit.text_len, config.dit.text_dim, device=device, dtype=torch.bfloat16
    )
    seconds = []
    for step in range(steps):
        begin = time.perf_counter()
        timestep = torch.tensor([900 - step], device=device)
        positive, negative = (
            model(latents, timestep, branch, return_dict=False)[0] for branch in (text, -text)
        )
        # waits for the device, as the sampling loop does
        bool(torch.isfinite(negative + 3 * (positive - negative)).all())
        seconds.append(time.perf_counter() - begin)
    return seconds
