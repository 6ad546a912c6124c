"""Scores the demo model's checkpoints on held-out captions with `lowvram.demo.checker`, and draws what it made.

python scripts/judge_demo.py --work build/demo --sheet build/demo/sheet.png
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import demo_models as networks
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from train_demo import averaged

from lowvram.demo import scenes
from lowvram.demo.checker import Match, describe, matches
from lowvram.sampling.schedule import expert_of, unipc_grid
from lowvram.sampling.solvers import UniPC

Velocity = Callable[[Tensor, int], Tensor]


def held_out_pairs(count: int, two_figures: int) -> list[tuple[scenes.Scene, int]]:
    """`count` captions that were never trained on, the last `two_figures` of them with two figures, each with a seed."""
    rng, pairs = random.Random(2026), []
    for number in range(count):
        wanted = 2 if number >= count - two_figures else 1
        while len((scene := scenes.held_out_scene(rng)).figures) != wanted:
            pass
        pairs.append((scene, number))
    return pairs


class Model:
    """The checkpoints of the training folder: experts where they exist, otherwise the shared DiT for both."""

    def __init__(self, work: Path, device: torch.device) -> None:
        shared = nn.ModuleDict({"dit": networks.new_dit(), "text": networks.new_text_encoder()})
        shared.load_state_dict(averaged(work / "dit.pt"))
        self.text, self.device = shared["text"].to(device).eval(), device
        self.experts = {"high_noise": shared["dit"], "low_noise": shared["dit"]}
        for name in self.experts:
            path = work / f"{name.replace('_', '-')}.pt"
            if path.exists():
                modules = nn.ModuleDict({"dit": networks.new_dit()})
                modules.load_state_dict(averaged(path))
                self.experts[name] = modules["dit"]
        self.experts = {name: dit.to(device).eval() for name, dit in self.experts.items()}
        self.vae = networks.new_vae()
        self.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
        self.vae.to(device).eval()

    def latents(self, pairs: list[tuple[scenes.Scene, int]], steps: int, shift: float, guidance: tuple[float, float]) -> Tensor:
        """guidance: of the high-noise and of the low-noise expert. Returns [B, 16, 5, 8, 8]."""
        ids = torch.cat(
            [networks.token_ids([scene.caption() for scene, _ in pairs]), networks.unconditional_ids()[1:].repeat(len(pairs), 1)]
        )
        features = networks.text_features(self.text, ids.to(self.device))
        x = torch.stack([torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(seed)) for _, seed in pairs]).to(self.device)
        schedule = unipc_grid(steps, shift)
        solver = UniPC(schedule)
        for t in schedule.timesteps.tolist():
            name = expert_of(t, 0.875)
            scale = guidance[name == "low_noise"]
            time = torch.full((2 * len(x),), float(t), device=self.device)
            velocity = self.experts[name](torch.cat([x, x]), time, encoder_hidden_states=features, return_dict=False)[0]
            positive, negative = velocity.chunk(2)
            x = solver.step(x, negative + scale * (positive - negative))
        return x

    def frames(self, latents: Tensor) -> np.ndarray:
        """Returns [B, F, H, W, 3] uint8."""
        mean, std = (value.to(self.device).view(1, -1, 1, 1, 1) for value in networks.official_statistics(self.vae))
        clip = networks.decode(self.vae, latents * std + mean).clamp(-1, 1)
        return ((clip + 1) * 127.5).byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def report(title: str, results: list[Match]) -> None:
    counts = {name: sum(getattr(match, name) for match in results) for name in ("ground", "colors", "shapes", "motion")}
    print(f"{title}: {sum(map(bool, results))}/{len(results)}  {counts}", flush=True)


def draw_sheet(path: Path, clips: list[np.ndarray]) -> None:
    """One row per clip, every second frame."""
    rows = [np.concatenate(list(clip[::2]), axis=1) for clip in clips]
    Image.fromarray(np.concatenate(rows)).save(path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--two-figures", type=int, default=8, help="how many of the pairs have two figures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--guidance", type=float, nargs=2, default=(4.0, 3.0), help="high-noise and low-noise")
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks.use_whole_clips()
    model, pairs = Model(args.work, args.device), held_out_pairs(args.pairs, args.two_figures)
    clips: list[np.ndarray] = []
    for start in range(0, len(pairs), 10):
        clips += list(model.frames(model.latents(pairs[start : start + 10], args.steps, args.shift, args.guidance)))
    results = [matches(clip, scene) for clip, (scene, _) in zip(clips, pairs, strict=True)]
    for (scene, seed), clip, result in zip(pairs, clips, results, strict=True):
        if not result:
            print(f"  {scene.caption()} (seed {seed}): {describe(clip)}")
    one = args.pairs - args.two_figures
    report("one figure", results[:one])
    report("two figures", results[one:])
    report("all", results)
    report("shuffled captions", [matches(clip, scene) for clip, (scene, _) in zip(clips[1:] + clips[:1], pairs, strict=True)])
    if args.sheet:
        draw_sheet(args.sheet, clips[:8] + clips[-6:])


if __name__ == "__main__":
    main()
