"""The mp4: pixels, sizes, metadata, and that a final name means a complete file."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

import lowvram.files.write
import lowvram.video
from lowvram.errors import DiskFullError, OutputError, UsageError
from lowvram.files.output import check_output
from lowvram.request import Request
from lowvram.video import (
    STATEMENT,
    TITLE,
    clip_metadata,
    read_metadata,
    to_uint8,
    write_video,
)

REQUEST = Request(
    prompt='a "red" ball; 红球 = #1\nrolls \\ away', width=832, height=480, num_frames=81, seed=7
)


def clip(frames: int = 3, height: int = 32, width: int = 48) -> Tensor:
    """Smooth, so that the codec keeps it: red grows to the right, green downwards, blue with
    time.
    """
    out = torch.zeros(frames, height, width, 3)
    out[..., 0] = torch.linspace(20, 235, width)
    out[..., 1] = torch.linspace(20, 235, height)[:, None]
    out[..., 2] = torch.linspace(20, 235, frames)[:, None, None]
    return out.to(torch.uint8)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [
            frame.to_ndarray(format="rgb24", src_colorspace="ITU709")
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_pixels_survive(tmp_path: Path, frames: int) -> None:
    original = clip(frames)
    write_video(tmp_path / "clip.mp4", original, 16, {})
    difference = np.abs(decoded(tmp_path / "clip.mp4").astype(int) - original.numpy().astype(int))
    assert difference.shape == (frames, 32, 48, 3)
    assert difference.mean() < 3
    assert difference.max() < 16


def test_stream_is_what_players_and_editors_read(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", clip(9), 16, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (16, 9)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        assert stream.codec_context.color_primaries == 1
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 1), (17, 32), (16, 31)])
def test_odd_sizes_are_made_even(tmp_path: Path, height: int, width: int) -> None:
    write_video(tmp_path / "clip.mp4", clip(2, height, width), 8, {})
    assert decoded(tmp_path / "clip.mp4").shape == (2, height + height % 2, width + width % 2, 3)


def test_scale_repeats_pixels(tmp_path: Path) -> None:
    checker = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    checker[:, ::2, ::2] = 255
    write_video(tmp_path / "clip.mp4", checker, 8, {}, scale=4)
    large = decoded(tmp_path / "clip.mp4")
    assert large.shape == (2, 32, 32, 3)
    expected = checker.numpy().repeat(4, axis=1).repeat(4, axis=2)
    assert np.abs(large.astype(int) - expected).mean() < 8


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Of tiny frames, many times: there x264's macroblock tree gives another file about once in
    fifteen.
    """
    contents = set()
    for _ in range(40):
        write_video(tmp_path / "clip.mp4", clip(9), 16, {"seed": 1}, overwrite=True)
        contents.add((tmp_path / "clip.mp4").read_bytes())
    assert len(contents) == 1


def test_metadata_holds_the_request_and_says_generated(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, clip(), 16, clip_metadata(REQUEST, "sha256:abc"))
    data = read_metadata(path)
    assert data["ai_generated"] is True
    assert data["model"] == "sha256:abc"
    assert Request(**data["request"]) == REQUEST
    with av.open(str(path)) as container:
        assert container.metadata["title"] == TITLE
        assert container.metadata["description"] == STATEMENT
        assert json.loads(container.metadata["comment"]) == data
    assert "artificial intelligence" in STATEMENT


def test_metadata_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "foreign.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16)))
        container.mux(stream.encode(None))
    for name in ("text.mp4", "foreign.mp4", "missing.mp4"):
        with pytest.raises(UsageError, match="not a video made by lowvram"):
            read_metadata(tmp_path / name)


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        write_video(path, clip(), 16, {})
    assert path.read_text() == "precious"
    write_video(path, clip(), 16, {}, overwrite=True)
    assert decoded(path).shape[0] == 3
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"

    def frames() -> Iterator[Tensor]:
        yield from clip()
        path.write_text("precious")

    with pytest.raises(OutputError, match="already exists"):
        write_video(path, frames(), 16, {})
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["clip.avi", "clip", "clip.mp4.part", ".mp4"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.mp4"):
        write_video(tmp_path / name, clip(), 16, {})


def test_bad_places_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match="folder"):
        check_output(tmp_path / "folder.mp4", overwrite=True)
    with pytest.raises(OutputError, match="create it first"):
        check_output(tmp_path / "missing" / "clip.mp4", overwrite=False)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "clip.mp4", overwrite=False)
    assert os.listdir(tmp_path) == []

    def refuse(path: object, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        OutputError, match=rf"cannot write {tmp_path}: Permission denied: choose another folder"
    ):
        check_output(tmp_path / "clip.mp4", overwrite=False)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_folder_that_not_even_root_can_write_is_refused() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc: .*choose another folder"):
        check_output(Path("/proc/clip.mp4"), overwrite=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
@pytest.mark.parametrize("name", ["12:30.mp4", "a%d b.mp4", "-clip.mp4", "红.mp4"])
def test_names_mean_files_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path(name), clip(), 16, {"x": 1})
    assert os.listdir() == [name]
    assert read_metadata(Path(name)) == {"x": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_p20_an_interrupted_write_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def frames() -> Iterator[Tensor]:
        yield from clip(20)
        raise error

    with pytest.raises(error):
        write_video(tmp_path / "clip.mp4", frames(), 16, {})
    assert os.listdir(tmp_path) == []


def test_p20_an_interrupted_overwrite_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("precious")
    with pytest.raises(UsageError, match="16x16"):
        write_video(
            path, [clip(1)[0], torch.zeros(16, 16, 3, dtype=torch.uint8)], 16, {}, overwrite=True
        )
    assert path.read_text() == "precious"


KILLED = """
import sys, time, torch
from pathlib import Path
from lowvram.video import write_video
def frames():
    for i in range(10000):
        yield torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        if i == 100:
            print("half", flush=True)
            time.sleep(60)
write_video(Path(sys.argv[1]), frames(), 16, {})
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_p20_kill_leaves_only_the_part(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        time.sleep(0.1)
        writer.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == ["clip.mp4.part"]
    write_video(path, clip(), 16, {})
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_p06_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lowvram.files.write, "_sync_file", full)
    with pytest.raises(DiskFullError, match="make room"):
        write_video(tmp_path / "clip.mp4", clip(), 16, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_p06_the_encoder_notices_a_limit_on_files(tmp_path: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large: .* \(ulimit -f\) .* another disk"):
            write_video(tmp_path / "clip.mp4", clip(9), 16, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [torch.zeros(8, 8, 3)],
        [torch.zeros(8, 8, 4, dtype=torch.uint8)],
        [torch.zeros(0, 8, 3, dtype=torch.uint8)],
    ],
    ids=["none", "float", "rgba", "empty"],
)
def test_frames_that_are_none_are_refused(tmp_path: Path, frames: list[Tensor]) -> None:
    with pytest.raises(UsageError, match="frame"):
        write_video(tmp_path / "clip.mp4", frames, 16, {})
    assert os.listdir(tmp_path) == []


def test_to_uint8_truncates_and_clamps() -> None:
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0])
    assert to_uint8(levels.view(1, 1, 1, 8).expand(3, 1, 1, 8))[0, 0, :, 0].tolist() == [
        0,
        0,
        63,
        127,
        191,
        254,
        255,
        255,
    ]


def test_to_uint8_keeps_frames_and_channels_apart() -> None:
    video = torch.rand(3, 4, 5, 6) * 2 - 1
    frames = to_uint8(video)
    assert frames.shape == (4, 5, 6, 3)
    assert frames.is_contiguous()
    assert frames[2, 3, 4].tolist() == [
        int((video[c, 2, 3, 4].item() + 1) / 2 * 255) for c in range(3)
    ]
