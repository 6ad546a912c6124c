"""Keys of LoRA files: the tensor of the expert that each changes, and how (formats.md 1f)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from lowvram.checkpoint.names import Shape, diffusers_dit_from_official, dit_shapes
from lowvram.variants import DiTConfig

# Longest first: the first that a key begins with is taken off.
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer_2.",
    "transformer.",
    "lora_unet__",
    "lora_unet_",
)
# part -> how a key of that part ends
_ADAPTER = r"(\.(?!bias$)\w+)?"  # PEFT writes the adapter's name
ENDINGS = {
    "down": rf"\.lora_down\.weight|\.lora_A{_ADAPTER}\.weight|\.lora_A|[._]lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight",
    "up": rf"\.lora_up\.weight|\.lora_B{_ADAPTER}\.weight|\.lora_B|[._]lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight",
    "bias": rf"\.diff_b|\.lora_B{_ADAPTER}\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff|\.diff_m",
    "set": r"\.set_weight",
    "dora": rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}(\.weight)?",
    **{part: rf"\.{part}" for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{part: rf"\.{part}" for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{part: rf"\.{part}" for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}
_ENDINGS = {part: re.compile(rf"(?P<module>.+?)(?:{ending})") for part, ending in ENDINGS.items()}


def target_of(key: str, config: DiTConfig) -> tuple[str, str] | None:
    """(official name of the tensor, part of the change) for a key; None for one that is unknown.

    `lora_unet_blocks_0_self_attn_q.lora_down.weight` -> (`blocks.0.self_attn.q.weight`, `down`).
    """
    tensors = _tensors_of_spellings(config)
    bare = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
    for part, ending in _ENDINGS.items():
        match = ending.fullmatch(bare)
        # as it is spelled first: a model's own names may begin as a prefix does
        names = (match["module"], f"{match['module']}.modulation") if match else ()
        for name in names:
            if name not in tensors or (
                name.endswith(".modulation") and part not in ("diff", "set")
            ):
                continue
            weight, bias = tensors[name]
            target = bias if part == "bias" else weight
            if target is not None:
                return target, part
    return None


def targets(keys: Iterable[str], config: DiTConfig) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by (official tensor name, part), and the keys that are unknown or repeat another."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in sorted(keys):
        place = target_of(key, config)
        if place is None or place[1] in found.get(place[0], {}):
            unknown.append(key)
        else:
            found.setdefault(place[0], {})[place[1]] = key
    return found, unknown


@lru_cache(8)
def _tensors_of_spellings(config: DiTConfig) -> Mapping[str, tuple[str | None, str | None]]:
    """Every spelling of a module, or of a tensor without one -> its weight and its bias."""
    shapes = dit_shapes(config)
    tensors: dict[str, tuple[str | None, str | None]] = {}
    for name in shapes:
        module = name.removesuffix(".weight").removesuffix(".bias")
        weight = name if module == name else f"{module}.weight"
        bias = f"{module}.bias"
        pair = (weight if weight in shapes else None, bias if bias in shapes else None)
        theirs = (diffusers_dit_from_official(weight) or "").removesuffix(".weight")
        for spelling in (module, theirs):
            if spelling:
                tensors[spelling] = tensors[spelling.replace(".", "_")] = pair
    return tensors


def expected_shape(target: str, config: DiTConfig) -> Shape:
    """Shape of a tensor of the expert."""
    return dit_shapes(config)[target]
