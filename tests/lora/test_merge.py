"""LoRAs merged before quantizing: every spelling gives the same bytes, and what does not fit is
refused by key.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_quantize.convert import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram.checkpoint.names import diffusers_dit_from_official, dit_shapes
from lowvram.checkpoint.source import open_source
from lowvram.errors import LoraError, LowvramError, UsageError
from lowvram.lora.file import LoraChoice, LoraFile, parse_choice, with_loras
from lowvram.store.manifest import read_manifest
from lowvram.variants import EXPERTS
from tests.helpers.checkpoints import tiny_config, tiny_weights, write_official

CONFIG = tiny_config(num_layers=1)
SHAPES = dit_shapes(CONFIG.dit)
RANK = 4
LINEARS = [
    "blocks.0.self_attn.q",
    "blocks.0.cross_attn.o",
    "blocks.0.ffn.0",
    "blocks.0.ffn.2",
    "text_embedding.0",
    "head.head",
]
Parts = dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("source") / "official", CONFIG)


def pairs(seed: int = 0, modules: list[str] | None = None) -> Parts:
    """A down, an up and an alpha per module, by (official module, part)."""
    generator = torch.Generator().manual_seed(seed)
    parts: Parts = {}
    for module in modules or LINEARS:
        outputs, inputs = SHAPES[f"{module}.weight"]
        parts[module, "down"] = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        parts[module, "up"] = torch.randn(outputs, RANK, generator=generator) * 0.3
        parts[module, "alpha"] = torch.tensor(8, dtype=torch.int64)
    return parts


def theirs(module: str) -> str:
    name = diffusers_dit_from_official(f"{module}.weight")
    assert name is not None
    return name.removesuffix(".weight")


def spelled(
    parts: Parts, prefix: str, module: Callable[[str], str], down: str, up: str
) -> dict[str, Tensor]:
    endings = {"down": down, "up": up, "alpha": ".alpha"}
    return {
        f"{prefix}{module(name)}{endings[part]}": value for (name, part), value in parts.items()
    }


SPELLINGS: dict[str, tuple[str, Callable[[str], str], str, str]] = {
    "comfyui": ("diffusion_model.", str, ".lora_down.weight", ".lora_up.weight"),
    "comfyui, A and B": ("diffusion_model.", str, ".lora_A.weight", ".lora_B.weight"),
    "comfyui, whole": ("model.diffusion_model.", str, ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.", theirs, ".lora_A.weight", ".lora_B.weight"),
    "diffusers, second": ("transformer_2.", theirs, ".lora_A.weight", ".lora_B.weight"),
    "diffusers, old": ("transformer.", theirs, "_lora.down.weight", "_lora.up.weight"),
    "diffusers, layer": (
        "transformer.",
        theirs,
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "peft": ("base_model.model.", str, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft, named": ("base_model.model.", theirs, ".lora_A.style.weight", ".lora_B.style.weight"),
    "kohya": (
        "lora_unet_",
        lambda name: name.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "wan-fun": (
        "lora_unet__",
        lambda name: name.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "bare": ("", str, ".lora.down.weight", ".lora.up.weight"),
    "bare, no suffix": ("", str, ".lora_A", ".lora_B"),
}


def merged_weights(source: Path, *choices: LoraChoice) -> dict[str, dict[str, Tensor]]:
    with open_source(source) as plain, with_loras(plain, choices) as opened:
        return {
            expert: {name: opened.components[expert].read(name) for name in SHAPES}
            for expert in EXPERTS
        }


def expected(expert: str, parts: Parts, strength: float) -> dict[str, Tensor]:
    weights = dict(tiny_weights(CONFIG, expert))
    for module in {name for name, _ in parts}:
        up, down = parts[module, "up"].double(), parts[module, "down"].double()
        delta = up @ down * (parts[module, "alpha"].item() / RANK) * strength
        name = f"{module}.weight"
        weights[name] = (weights[name].double() + delta).float()
    return weights


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_bits(name: str, source: Path, tmp_path: Path) -> None:
    path, parts = tmp_path / "style.safetensors", pairs()
    save_file(spelled(parts, *SPELLINGS[name]), path)
    found = merged_weights(source, LoraChoice(path, 0.7))
    for expert in EXPERTS:
        wanted = expected(expert, parts, 0.7)
        assert all(torch.equal(found[expert][key], wanted[key]) for key in SHAPES)


def test_a_lora_is_merged_before_quantizing_and_recorded(source: Path, tmp_path: Path) -> None:
    """The store has the bytes of a source with the merged weights; the other expert's its own."""
    path, parts = tmp_path / "style.safetensors", pairs()
    save_file(spelled(parts, *SPELLINGS["comfyui"]), path)
    quantize(source, tmp_path / "merged", loras=[LoraChoice(path, 0.7, ("low_noise",))])
    quantize(source, tmp_path / "plain")
    folder = write_official(tmp_path / "source", CONFIG, shards=1)
    shard = folder / "low_noise_model" / "diffusion_pytorch_model.safetensors"
    save_file(expected("low_noise", parts, 0.7), shard)
    quantize(folder, tmp_path / "wanted")
    for component, other in (("low_noise", "wanted"), ("high_noise", "plain"), ("vae", "plain")):
        file = f"{component}.safetensors"
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / other / file).read_bytes()
    record = read_manifest(tmp_path / "merged").source
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["low_noise loras"] == f"style.safetensors at 0.7, sha256 {digest}"
    assert "high_noise loras" not in record


def test_p15_a_strength_of_zero_gives_the_bits_of_the_model(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(spelled(pairs(), *SPELLINGS["comfyui"]), path)
    quantize(source, tmp_path / "zero", loras=[f"{path}:0"])
    quantize(source, tmp_path / "plain")
    for expert in EXPERTS:
        file = f"{expert}.safetensors"
        assert (tmp_path / "zero" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_several_are_merged_one_after_the_other(source: Path, tmp_path: Path) -> None:
    one, two = pairs(1), pairs(2, LINEARS[:2])
    for name, parts in (("one", one), ("two", two)):
        save_file(spelled(parts, *SPELLINGS["kohya"]), tmp_path / f"{name}.safetensors")
    found = merged_weights(
        source,
        LoraChoice(tmp_path / "one.safetensors"),
        LoraChoice(tmp_path / "two.safetensors", -0.5, ("high_noise",)),
    )
    for expert in EXPERTS:
        wanted = expected(expert, one, 1.0)
        for module in LINEARS[:2] if expert == "high_noise" else []:
            delta = two[module, "up"].double() @ two[module, "down"].double() * -1.0
            wanted[f"{module}.weight"] = (wanted[f"{module}.weight"].double() + delta).float()
        assert all(torch.equal(found[expert][key], wanted[key]) for key in SHAPES)


def one_change(
    source: Path, tmp_path: Path, tensors: dict[str, Tensor], strength: float = 1.0
) -> Any:
    path = tmp_path / "change.safetensors"
    save_file(tensors, path)
    return merged_weights(source, LoraChoice(path, strength))["high_noise"]


def test_full_differences_change_weights_biases_norms_and_modulation(
    source: Path, tmp_path: Path
) -> None:
    weights = tiny_weights(CONFIG, "high_noise")
    shapes = {
        "diffusion_model.blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight",
        "diffusion_model.blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
        "diffusion_model.head.modulation.diff": "head.modulation",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    changes = {key: torch.randn(SHAPES[name]) for key, name in shapes.items()}
    changes["diffusion_model.blocks.0.ffn.2.set_weight"] = torch.randn(
        SHAPES["blocks.0.ffn.2.weight"]
    )
    found = one_change(source, tmp_path, changes, 0.5)
    for key, name in shapes.items():
        wanted = (weights[name].double() + 0.5 * changes[key].double()).float()
        assert torch.equal(found[name], wanted), name
    assert torch.equal(
        found["blocks.0.ffn.2.weight"], changes["diffusion_model.blocks.0.ffn.2.set_weight"]
    )


def test_a_convolution_has_low_rank_pairs_too(source: Path, tmp_path: Path) -> None:
    shape = SHAPES["patch_embedding.weight"]
    down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1, 1)
    found = one_change(
        source,
        tmp_path,
        {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up},
    )
    weight = tiny_weights(CONFIG, "high_noise")["patch_embedding.weight"].double()
    wanted = weight + (up.double().flatten(1) @ down.double().flatten(1)).view(shape)
    assert torch.equal(found["patch_embedding.weight"], wanted.float())


def test_dora_lokr_and_loha_follow_their_formulas(source: Path, tmp_path: Path) -> None:
    name, (outputs, inputs) = "blocks.0.self_attn.k", SHAPES["blocks.0.self_attn.k.weight"]
    weight = tiny_weights(CONFIG, "high_noise")[f"{name}.weight"].double()
    up, down = torch.randn(outputs, RANK), torch.randn(RANK, inputs)
    size = torch.rand(outputs, 1) + 0.5
    found = one_change(
        source,
        tmp_path,
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.dora_scale": size},
    )
    turned = weight + up.double() @ down.double()
    wanted = weight + (turned * (size.double() / turned.norm(dim=1, keepdim=True)) - weight)
    assert torch.equal(found[f"{name}.weight"], wanted.float())

    one, a, b = torch.randn(8, 4), torch.randn(outputs // 8, 2), torch.randn(2, inputs // 4)
    alpha = torch.tensor(6.0)
    found = one_change(
        source,
        tmp_path,
        {
            f"{name}.lokr_w1": one,
            f"{name}.lokr_w2_a": a,
            f"{name}.lokr_w2_b": b,
            f"{name}.alpha": alpha,
        },
    )
    wanted = weight + torch.kron(one.double(), a.double() @ b.double()) * 3
    assert torch.allclose(found[f"{name}.weight"], wanted.float(), rtol=1e-6, atol=1e-6)

    factors = {
        f"hada_w{number}_{part}": torch.randn(*shape)
        for number in "12"
        for part, shape in (("a", (outputs, RANK)), ("b", (RANK, inputs)))
    }
    found = one_change(source, tmp_path, {f"{name}.{key}": value for key, value in factors.items()})
    first = factors["hada_w1_a"].double() @ factors["hada_w1_b"].double()
    second = factors["hada_w2_a"].double() @ factors["hada_w2_b"].double()
    assert torch.equal(found[f"{name}.weight"], (weight + first * second).float())


def good() -> dict[str, Tensor]:
    return spelled(pairs(), *SPELLINGS["comfyui"])


KEY = "diffusion_model.blocks.0.ffn.0.lora_down.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "renamed": (
        lambda keys: keys.update({"diffusion_model.blocks.0.ffn.9.alpha": keys.pop(KEY)}),
        r"blocks\.0\.ffn\.9\.alpha",
    ),
    "a block too many": (
        lambda keys: keys.update({KEY.replace("blocks.0", "blocks.7"): keys[KEY].clone()}),
        r"blocks\.7\.ffn",
    ),
    "without its other half": (lambda keys: keys.pop(KEY), r"ffn\.0\.lora_up\.weight.*missing"),
    "another rank": (
        lambda keys: keys.update({KEY: torch.ones(3, SHAPES["blocks.0.ffn.0.weight"][1])}),
        r"ffn\.0\.lora_up\.weight' does not fit .* its rank is 4, that of the other 3",
    ),
    "another width": (
        lambda keys: keys.update({KEY: torch.ones(RANK, 999)}),
        r"ffn\.0\.lora_down\.weight' does not fit blocks\.0\.ffn\.0\.weight",
    ),
    "NaN": (
        lambda keys: keys.update({KEY: keys[KEY] * float("nan")}),
        r"ffn\.0\.lora_down\.weight' holds NaN",
    ),
    "integers": (
        lambda keys: keys.update({KEY: keys[KEY].to(torch.int8)}),
        r"ffn\.0\.lora_down\.weight' is stored as I8",
    ),
    "two spellings of one": (
        lambda keys: keys.update({KEY.replace("lora_down", "lora_A"): keys[KEY].clone()}),
        r"repeat another: '.*ffn\.0\.lora_",
    ),
    "an alpha of several": (
        lambda keys: keys.update({KEY.replace("lora_down.weight", "alpha"): torch.ones(3)}),
        r"ffn\.0\.alpha' does not fit",
    ),
    "of a text encoder": (
        lambda keys: keys.update({"lora_te_layer_0.alpha": torch.ones(())}),
        "lora_te_layer_0",
    ),
    "of image to video": (
        lambda keys: keys.update({"diffusion_model.img_emb.proj.1.diff": torch.ones(4)}),
        "img_emb",
    ),
    "nothing": (lambda keys: keys.clear(), "changes nothing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_p15_what_does_not_fit_is_refused_by_key(name: str, source: Path, tmp_path: Path) -> None:
    change, said = WRONG[name]
    keys = good()
    change(keys)
    save_file(keys, tmp_path / "style.safetensors")
    with pytest.raises(LoraError, match=said) as caught:
        quantize(source, tmp_path / "m", loras=[str(tmp_path / "style.safetensors")])
    assert "style.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("name", "title", "experts", "refused"),
    [
        ("wan_high_noise.safetensors", None, EXPERTS, "--lora-high alone"),
        ("wan_low_noise.safetensors", None, ("high_noise",), "--lora-low alone"),
        ("style.safetensors", "Lightning HIGH", ("low_noise",), "--lora-high alone"),
        ("wan_low_noise.safetensors", None, ("low_noise",), ""),
        ("high_and_low.safetensors", None, EXPERTS, ""),
        ("highlands.safetensors", None, EXPERTS, ""),
    ],
)
def test_p15_a_lora_of_the_other_expert_is_refused(
    name: str, title: str | None, experts: tuple[str, ...], refused: str, tmp_path: Path
) -> None:
    save_file(good(), tmp_path / name, None if title is None else {"title": title})
    choice = LoraChoice(tmp_path / name, 1.0, experts)
    if refused:
        with pytest.raises(LoraError, match=refused):
            LoraFile(choice, CONFIG.dit)
    else:
        LoraFile(choice, CONFIG.dit).close()


def test_files_that_are_none_and_strengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="does not exist"):
        LoraFile(LoraChoice(tmp_path / "none.safetensors"), CONFIG.dit)
    with pytest.raises(LoraError, match=r"no \.safetensors file"):
        LoraFile(LoraChoice(tmp_path / "style.pt"), CONFIG.dit)
    assert parse_choice("a.safetensors:0.5") == LoraChoice(Path("a.safetensors"), 0.5)
    assert parse_choice("a.safetensors") == LoraChoice(Path("a.safetensors"))
    assert parse_choice(r"C:\a.safetensors").path == Path(r"C:\a.safetensors")
    assert parse_choice(r"C:\a.safetensors:-1.5").strength == -1.5
    for wrong in ("", ":0.5", "a.safetensors:nan", "a.safetensors:1e9"):
        with pytest.raises(UsageError, match=r"write it FILE|outside -100"):
            parse_choice(wrong)


def test_p15_mutations_of_keys_are_right_or_refused(source: Path, tmp_path: Path) -> None:
    """Drawn anew at each run: no key is passed over in silence."""
    rng, path = random.Random(), tmp_path / "style.safetensors"
    wanted = expected("high_noise", pairs(), 1.0)
    for _ in range(60):
        keys = good()
        name = rng.choice(sorted(keys))
        value = keys.pop(name)
        at = rng.randrange(len(name))
        changed = rng.choice(
            [
                name[:at] + rng.choice("abz09._") + name[at + 1 :],
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name.upper(),
                name.replace("diffusion_model.", rng.choice(["transformer.", "", "model."])),
            ]
        )
        if changed in keys:
            continue
        save_file(keys | {changed: value}, path)
        try:
            found = merged_weights(source, LoraChoice(path, 1.0, ("high_noise",)))["high_noise"]
        except LowvramError:
            continue
        assert all(torch.equal(found[key], wanted[key]) for key in SHAPES), changed


def test_a_resumed_run_wants_the_same_loras(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(good(), path)

    def stop(event: Any) -> None:
        if event.phase == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "m", loras=[str(path)], progress=stop)
    for others in ([], [f"{path}:0.5"]):
        with pytest.raises(LowvramError, match="high_noise"):
            quantize(source, tmp_path / "m", resume=True, loras=others)
    quantize(source, tmp_path / "m", resume=True, loras=[str(path)])
    assert "high_noise loras" in read_manifest(tmp_path / "m").source
    assert load_file(tmp_path / "m" / "high_noise.safetensors")


def test_a_lora_that_changes_during_the_run_gives_no_store(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(good(), path)

    def change(event: Any) -> None:
        if event.phase == "quantize" and event.component == "high_noise":
            path.write_bytes(path.read_bytes())
            os.utime(path, (1, 1))

    with pytest.raises(LoraError, match="changed since it was opened"):
        quantize(source, tmp_path / "m", loras=[str(path)], progress=change)
    with pytest.raises(LowvramError):
        read_manifest(tmp_path / "m")
