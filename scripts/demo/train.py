"""Trains the demo model from nothing: a small Wan VAE, then one DiT with its text encoder, then the
two experts.

    python -m scripts.demo.train --work build/demo            # every stage, resuming where the last run stopped
    python -m scripts.demo.train --work build/demo --stage high-noise   # and low-noise in another process, side by side

Everything is drawn by `lowvram.demo.scenes`, so there is no data set. Each stage is seeded, saves
its state every `SAVE_EVERY` steps and continues from it. `export` writes the official file layout
that `lowvram quantize` reads.

The weights that ship took about four hours on 2 shared CPU cores: the VAE 80 minutes, the shared
DiT 40, both experts side by side 45, and the low-noise expert alone another 80, on one core. All
but the first two stages ran as they stand here. Those two had run earlier, with purple among the
colours of the crowds, so a run from nothing gives similar weights, not the same ones, and has not
been made.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from lowvram.demo import scenes
from scripts.demo import models as networks

SAVE_EVERY = 200
BOUNDARY = 0.875
SHARDS = 2  # every step averages the gradients of this many half batches, one thread each
BATCH = 8  # clips of the shared DiT's half batch
# clips of an expert's batch: one thread each, so that both train side by side in two processes
EXPERT_BATCH = 16
# of every training caption, by its figures: a little more than half of all clips show one figure
DRAWINGS = {1: 24, 2: 2}
NO_CAPTION = 0.1  # share of training clips whose caption is dropped, for classifier-free guidance
# What the low-noise expert gets right last: corners, most of all at low contrast. How many times as
# often it sees them.
HARD = {"square": 2.0, "triangle": 1.5, "gray": 1.5}
# half the noise levels lie as on a grid of each shift: most are high, where the caption decides
TRAIN_SHIFTS = (2.0, 10.0)

MODEL_FOLDER = Path(scenes.__file__).parent / "model"
SAMPLING = {
    "width": scenes.SIZE, "height": scenes.SIZE, "num_frames": scenes.NUM_FRAMES, "fps": scenes.FPS,
    "steps": 16, "shift": 5.0, "guidance_high": 3.0, "guidance_low": 2.0,
}  # fmt: skip
TRAINING_SCENES = [scene for scene in scenes.all_scenes() if scenes.split(scene) == "train"]
WORKERS = ThreadPoolExecutor(SHARDS)

LossOf = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """AdamW with warm-up, then a cosine from `peak_lr` that would end at `horizon` steps; `ema` is
    the weight average's decay.
    """

    steps: int
    peak_lr: float
    ema: float
    horizon: int = 0
    shards: int = SHARDS

    def lr(self, step: int) -> float:
        return (
            self.peak_lr
            * min(1.0, (step + 1) / 100)
            * (0.5 + 0.5 * math.cos(math.pi * step / (self.horizon or self.steps)))
            + 1e-6
        )


def train(path: Path, modules: nn.ModuleDict, schedule: Schedule, loss_of: LossOf) -> None:
    """`path` holds weights, optimiser, average and step, and is replaced atomically."""
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.peak_lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    average = {name: value.clone() for name, value in modules.state_dict().items()}
    start, steps = 0, schedule.steps
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    began, shown = time.time(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss = backward(
            parameters,
            step,
            loss_of,
            [step * 1000003 + shard * 500009 + len(path.stem) for shard in range(schedule.shards)],
        )
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = 0.98 * shown + 0.02 * loss if shown else loss
        decay = min(schedule.ema, (1 + step) / (10 + step))
        weights = modules.state_dict()
        torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1 - decay)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(
                path,
                {
                    "weights": weights,
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                },
            )
            rate = (time.time() - began) / (step + 1 - start)
            print(
                f"{path.stem} {step + 1}/{steps} loss {shown:.5f} {rate:.3f} s/step, "
                f"{(steps - step - 1) * rate / 60:.1f} min left",
                flush=True,
            )


def backward(parameters: list[nn.Parameter], step: int, loss_of: LossOf, seeds: list[int]) -> float:
    """Sets `grad` to the mean over the shards. One thread works at each shard: far cheaper than two
    threads within each operator.
    """

    def gradients(seed: int) -> tuple[float, tuple[Tensor, ...]]:
        with torch.autocast(parameters[0].device.type, torch.bfloat16):
            loss = loss_of(step, torch.Generator().manual_seed(seed))
        return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True)

    losses, shards = zip(
        *(WORKERS.map(gradients, seeds) if len(seeds) > 1 else map(gradients, seeds)), strict=True
    )
    for parameter, *parts in zip(parameters, *shards, strict=True):
        parameter.grad = None if parts[0] is None else sum(parts[1:], parts[0]) / len(parts)
    mean: float = sum(losses) / len(losses)
    return mean


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def averaged(path: Path) -> dict[str, Tensor]:
    average: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")["average"]
    return average


def vae_loss(
    vae: AutoencoderKLWan,
    clip: Tensor,
    generator: torch.Generator,
    noise: float = 0.05,
    edges: float = 0.0,
) -> Tensor:
    """L1 + L2 of the reconstruction, and `edges` times L1 of its gradients; latents get noise, so
    the DiT's small errors stay small.
    """
    clip = clip.to(vae.device)
    latents = networks.encode(vae, clip).float()
    scale = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    noisy = latents + noise * scale * torch.randn(latents.shape, generator=generator).to(vae.device)
    error = networks.decode(vae, noisy).float() - clip
    loss = error.abs().mean() + error.square().mean() + 1e-4 * latents.square().mean()
    return (
        loss + edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        if edges
        else loss
    )


def scene_clips(step: int, generator: torch.Generator) -> Tensor:
    """Two clips of full size, [2, 3, F, H, W]: training scenes, and crowds at every fourth step."""
    if step % 4 == 0:
        return scenes.render_collage(generator, 2, scenes.NUM_FRAMES, scenes.SIZE, figures=4)
    chosen = torch.randint(len(TRAINING_SCENES), (2,), generator=generator)
    return torch.stack([scenes.render(TRAINING_SCENES[index], generator) for index in chosen])


def train_vae_image(work: Path, device: torch.device) -> None:
    vae = networks.new_vae().to(device)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return vae_loss(vae, scenes.render_collage(generator, 32, 1, 32), generator)

    train(
        work / "vae-image.pt",
        nn.ModuleDict({"vae": vae}),
        Schedule(3000, 3e-3, ema=0.99, horizon=5000, shards=1),
        loss_of,
    )


def train_vae_video(work: Path, device: torch.device) -> None:
    modules = nn.ModuleDict({"vae": networks.new_vae().to(device)})
    modules.load_state_dict(averaged(work / "vae-image.pt"))

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        frames, size, batch = (
            (5, 32, 6),
            (9, 32, 4),
            (17, 32, 2),
            (5, 48, 3),
            (9, 32, 4),
            (17, 32, 2),
        )[step % 6]
        return vae_loss(
            modules["vae"],
            scenes.render_collage(generator, batch, frames, size, figures=4),
            generator,
        )

    train(work / "vae-video.pt", modules, Schedule(2000, 1.5e-3, ema=0.99, shards=1), loss_of)


def train_vae_scenes(work: Path, device: torch.device) -> None:
    """Full frames of what the DiT will draw, with weight on edges: a corner is what tells shapes
    apart.
    """
    modules = nn.ModuleDict({"vae": networks.new_vae().to(device)})
    modules.load_state_dict(averaged(work / "vae-video.pt"))

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return vae_loss(modules["vae"], scene_clips(step, generator), generator, edges=0.5)

    train(work / "vae-scenes.pt", modules, Schedule(1500, 1e-3, ema=0.99), loss_of)


@torch.no_grad()
def cache_latents(work: Path, device: torch.device) -> None:
    """Encodes several drawings of every training scene, folds their statistics into the VAE, keeps
    the normalised latents and captions.
    """
    if (work / "latents.pt").exists():
        return
    vae = networks.new_vae().to(device)
    vae.load_state_dict(
        {
            name.removeprefix("vae."): value
            for name, value in averaged(work / "vae-scenes.pt").items()
        }
    )
    began, generator = time.time(), torch.Generator().manual_seed(4)
    chosen = [scene for scene in TRAINING_SCENES for _ in range(DRAWINGS[len(scene.figures)])]

    def latents_of(clip: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return networks.encode(vae, clip.to(device)).float().cpu()

    batches = (
        torch.stack([scenes.render(scene, generator) for scene in chosen[start : start + 8]])
        for start in range(0, len(chosen), 8)
    )
    values = torch.cat(list(WORKERS.map(latents_of, batches)))
    print(f"latents of {len(chosen)} clips in {time.time() - began:.0f} s", flush=True)
    mean, std = values.mean(dim=(0, 2, 3, 4)), values.std(dim=(0, 2, 3, 4))
    networks.fold_statistics(vae.cpu(), mean, std)
    save(work / "vae.pt", vae.state_dict())
    normal = (values - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    save(
        work / "latents.pt",
        {
            "latents": normal.half(),
            "ids": networks.token_ids([scene.caption() for scene in chosen]),
        },
    )


def train_vae_decoder(work: Path, device: torch.device) -> None:
    """The decoder alone, so that the cached latents stay true, on noisier latents: clean edges even
    of the DiT's rough ones.
    """
    modules = nn.ModuleDict({"vae": networks.new_vae().to(device)})
    vae = modules["vae"]
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return vae_loss(vae, scene_clips(step, generator), generator, noise=0.15, edges=0.5)

    train(work / "vae-decoder.pt", modules, Schedule(900, 8e-4, ema=0.99), loss_of)


def noise_levels(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """`count` sigmas within low..high, stratified, each on an even grid of one of
    `TRAIN_SHIFTS`.
    """
    u = (
        torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    ) / count
    k = torch.tensor(TRAIN_SHIFTS).repeat(count // len(TRAIN_SHIFTS) + 1)[:count]
    first, last = low / (k - (k - 1) * low), high / (k - (k - 1) * high)
    u = first + (last - first) * u
    return k * u / (1 + (k - 1) * u)


class Clips:
    """Random batches of the cached latents and their captions' ids; each word of `weights` makes
    its clips so many times as frequent.
    """

    def __init__(
        self,
        work: Path,
        device: torch.device,
        count: int,
        of_one_figure: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.count = count
        cache = torch.load(work / "latents.pt", weights_only=True)
        chosen = ~says(cache["ids"], "and") | (not of_one_figure)
        self.latents, self.ids = cache["latents"][chosen].float(), cache["ids"][chosen]
        self.none, self.device = networks.unconditional_ids(), device
        self.weight: Tensor | None = None
        if weights:
            self.weight = torch.ones(len(self.ids))
            for word, times in weights.items():
                self.weight[says(self.ids, word)] *= times

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.weight is None:
            index = torch.randint(len(self.latents), (self.count,), generator=generator)
        else:
            index = torch.multinomial(
                self.weight, self.count, replacement=True, generator=generator
            )
        dropped = torch.rand(self.count, 1, generator=generator) < NO_CAPTION
        none = self.none[torch.randint(len(self.none), (self.count,), generator=generator)]
        return self.latents[index].to(self.device), torch.where(dropped, none, self.ids[index]).to(
            self.device
        )


def says(ids: Tensor, word: str) -> Tensor:
    """[len(ids)] bool: which of the captions hold `word`."""
    return (ids == networks.token_ids([word])[0, 0]).any(1)


def flow_loss(
    dit: WanTransformer3DModel,
    latents: Tensor,
    features: Tensor,
    sigma: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """|| v(x_sigma, 1000 sigma) - (noise - x0) ||^2 with x_sigma = (1 - sigma) x0 + sigma noise."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigma = sigma.to(latents.device)
    mixed = latents + sigma.view(-1, 1, 1, 1, 1) * (noise - latents)
    (velocity,) = dit(mixed, 1000 * sigma, encoder_hidden_states=features, return_dict=False)
    return F.mse_loss(velocity.float(), noise - latents)


def train_dit(work: Path, device: torch.device) -> None:
    """One DiT for every noise level, jointly with the text encoder."""
    modules = nn.ModuleDict({"dit": networks.new_dit(), "text": networks.new_text_encoder()}).to(
        device
    )
    clips = Clips(work, device, BATCH)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        latents, ids = clips.batch(generator)
        sigma = noise_levels(BATCH, 0.0, 1.0, generator)
        return flow_loss(
            modules["dit"], latents, networks.text_features(modules["text"], ids), sigma, generator
        )

    train(work / "dit.pt", modules, Schedule(10000, 1.2e-3, ema=0.998, horizon=18000), loss_of)


def train_expert(work: Path, device: torch.device, name: str, low: float, high: float) -> None:
    """The shared DiT, continued on its own noise levels with the text encoder frozen: on all clips,
    then on those of one figure.

    Corners come last, and from the low-noise expert alone: begun on drawn clips' latents at the
    boundary, it lost as many of them.
    """
    shared = nn.ModuleDict({"dit": networks.new_dit(), "text": networks.new_text_encoder()})
    shared.load_state_dict(averaged(work / "dit.pt"))
    dit, text = shared["dit"].to(device), shared["text"].to(device).requires_grad_(False)
    modules = nn.ModuleDict({"dit": dit})

    def loss_on(clips: Clips) -> LossOf:
        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            latents, ids = clips.batch(generator)
            sigma = noise_levels(EXPERT_BATCH, low, high, generator)
            return flow_loss(dit, latents, networks.text_features(text, ids), sigma, generator)

        return loss_of

    first, then, last = work / f"{name}-all.pt", work / f"{name}-one.pt", work / f"{name}.pt"
    train(
        first,
        modules,
        Schedule(4200, 6e-4, ema=0.998, horizon=6000, shards=1),
        loss_on(Clips(work, device, EXPERT_BATCH)),
    )
    modules.load_state_dict(averaged(first))
    of_one = loss_on(Clips(work, device, EXPERT_BATCH, of_one_figure=True))
    train(then, modules, Schedule(5000, 5e-4, ema=0.998, shards=1), of_one)
    modules.load_state_dict(averaged(then))
    train(last, modules, Schedule(2200, 3e-4, ema=0.998, shards=1), of_one)
    if name == "low-noise":
        modules.load_state_dict(averaged(last))
        of_hard = loss_on(Clips(work, device, EXPERT_BATCH, of_one_figure=True, weights=HARD))
        train(
            work / f"{name}-edges.pt", modules, Schedule(22000, 6e-4, ema=0.998, shards=1), of_hard
        )


def export(work: Path, device: torch.device, model: Path = MODEL_FOLDER) -> None:
    """Writes the model that ships inside the package."""
    shared = nn.ModuleDict({"dit": networks.new_dit(), "text": networks.new_text_encoder()})
    shared.load_state_dict(averaged(work / "dit.pt"))
    experts = {}
    for name, last in (("high_noise", "high-noise.pt"), ("low_noise", "low-noise-edges.pt")):
        experts[name] = networks.new_dit()
        weights = averaged(work / last)
        experts[name].load_state_dict(
            {key.removeprefix("dit."): value for key, value in weights.items()}
        )
    vae = networks.new_vae()
    vae.load_state_dict(
        {
            key.removeprefix("vae."): value
            for key, value in averaged(work / "vae-decoder.pt").items()
        }
    )
    networks.write_official(model, experts, shared["text"], vae, SAMPLING)
    print(
        f"{model}: {sum(path.stat().st_size for path in model.rglob('*') if path.is_file()):,} bytes",
        flush=True,
    )


STAGES: dict[str, Callable[[Path, torch.device], None]] = {
    "vae-image": train_vae_image,
    "vae-video": train_vae_video,
    "vae-scenes": train_vae_scenes,
    "latents": cache_latents,
    "vae-decoder": train_vae_decoder,
    "dit": train_dit,
    "high-noise": lambda work, device: train_expert(work, device, "high-noise", BOUNDARY, 1.0),
    "low-noise": lambda work, device: train_expert(work, device, "low-noise", 0.0, BOUNDARY),
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    networks.use_whole_clips()
    networks.use_float_attention()
    for name, run in STAGES.items():
        if args.stage in (name, "all"):
            run(args.work, args.device)


if __name__ == "__main__":
    main()
