"""The VAE's tiles: they cover the clip, fade into one another, and a failed decode costs no
sampling.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowvram.models.vae import WanVAE, tile_starts
from lowvram.progress import Progress
from lowvram.store.reader import Store
from tests.helpers.runs import CPU, digest, pipeline_of, request_of

StoreOf = Callable[[str], Store]


def vae_of(store: Store) -> WanVAE:
    file = store.files["vae"]
    return WanVAE(store.config.vae, file.rest, file.read, CPU)


def clip_of(
    vae: WanVAE,
    latents: torch.Tensor,
    tile_pixels: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """[3, F, H, W] put together from its pieces, each pixel of which comes once."""
    frames, height, width = (
        4 * (latents.shape[1] - 1) + 1,
        *(8 * length for length in latents.shape[2:]),
    )
    clip = torch.full((3, frames, height, width), float("nan"))
    for first, top, pixels in vae.decode(latents, tile_pixels, progress):
        area = clip[:, first : first + pixels.shape[1], top : top + pixels.shape[2]]
        assert bool(area.isnan().all())
        area.copy_(pixels)
    assert not bool(clip.isnan().any())
    return clip


@pytest.mark.parametrize("length", [8, 32, 33, 56, 57, 90, 160])
def test_tiles_cover_everything_and_stay_inside(length: int) -> None:
    starts = tile_starts(length, 32, 24)
    covered = {position for start in starts for position in range(start, min(start + 32, length))}
    assert covered == set(range(length))
    assert all(start + 32 <= length for start in starts) or length < 32
    assert len(starts) == len(set(starts))


def test_tiles_of_a_local_decoder_join_without_a_seam(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pixel depends on its own latent alone, any tiling must give the untiled clip."""
    vae = vae_of(tiny_store("int8"))

    def nearest(self: WanVAE, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        pixels = latents[:3].repeat_interleave(8, -1).repeat_interleave(8, -2).tanh()
        for frame in range(latents.shape[1]):
            yield pixels[:, frame : frame + 1].repeat(1, 4 if frame else 1, 1, 1)

    monkeypatch.setattr(WanVAE, "_decode_tile", nearest)
    latents = torch.randn(16, 2, 40, 50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(clip_of(vae, latents, 256), clip_of(vae, latents, 0), atol=1e-6)


def test_tiled_frames_are_near_the_untiled_ones(tiny_store: StoreOf) -> None:
    vae = vae_of(tiny_store("int8"))
    coarse = torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    latents = torch.nn.functional.interpolate(coarse, (34, 36), mode="bicubic")  # [C, T, h, w]
    calls: list[tuple[int, int]] = []
    tiled = clip_of(vae, latents, 256, lambda done, total: calls.append((done, total)))
    assert tiled.shape == (3, 1, 272, 288)
    assert calls[-1] == (4, 4)
    assert float((tiled - clip_of(vae, latents, 0)).abs().mean()) < 0.1


def test_a_failed_decode_costs_no_sampling(
    tiny_store: StoreOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    request, state = request_of(pipeline), tmp_path / "clip.mp4.resume"
    expected = digest(pipeline.generate(request).frames)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("the decoder failed")

    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "_decode_tile", fail)
        with pytest.raises(RuntimeError, match="the decoder failed"):
            pipeline.generate(request, state_file=state)
    phases: set[str] = set()

    def listen(event: Progress) -> None:
        phases.add(event.phase)

    again = pipeline.generate(request, state_file=state, resume=True, listener=listen)
    assert digest(again.frames) == expected
    assert phases == {"decode"}


@pytest.mark.slow
def test_seams_are_invisible_in_a_drawn_clip() -> None:
    """The trained VAE, four tiles against one piece, of one clip: no pixel where tiles overlap is
    two of 255 levels off, and no line of a tile's edge stands out. Other clips differ by up to 10
    levels in single pixels (docs/benchmarks/vae_tiles.json).

    A viewer sees steps between neighbours; one level is the smallest that a frame can hold. The
    last line shows what would be seen where one tile simply covers the other: the measure can fail.
    """
    found = importlib.import_module("scripts.bench.vae").measure()
    assert found["psnr_of_tiles_against_one_piece_db"] > 70
    assert (
        abs(
            found["psnr_of_tiles_against_the_drawing_db"]
            - found["psnr_of_one_piece_against_the_drawing_db"]
        )
        < 0.05
    )
    assert found["largest_difference_in_overlaps"] < 2
    assert found["step_at_edges_of_tiles"] < 0.1
    assert found["step_at_edges_of_tiles"] <= 2 * found["step_elsewhere"]
    assert found["step_where_one_tile_covers_the_other"] > 10 * found["step_at_edges_of_tiles"]
