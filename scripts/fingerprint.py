"""Hashes of what lowvram makes of the demo model: run on two commits, equal files mean that no byte
of a store, a frame or a plan changed.

    python -m scripts.fingerprint before.json --source /path/to/lowvram/demo/model

Use the same --source for both: a manifest holds the times of change of its files.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import lowvram

FORMATS = ("int8", "int8-plain", "fp8", "bf16", "fp32")
PROMPTS = (
    ("int8", "a red circle moves right on a white background", 0),
    ("int8", "a blue square moves left on a black background", 1),
    ("int8", "a green triangle grows on a white background", 2),
    ("int8-plain", "a yellow circle moves up on a blue background", 3),
    ("fp8", "a red square moves down on a black background", 4),
    ("bf16", "a blue circle and a red triangle move right on a white background", 5),
)
SIZES = (("832x480", 33), ("832x480", 81), ("1280x720", 81), ("640x384", 121))
MACHINES: tuple[dict[str, Any], ...] = (
    {"gpu": "RTX 3060 12GB", "ram": "16GiB"},
    {"gpu": "RTX 4090", "ram": "32GiB", "vram": "8GiB"},
    {"gpu": "RTX 4060 8GB", "ram": "24GiB", "link": "PCIe 3.0 x8", "disk": "2GB"},
    {"gpu": None, "ram": "16GiB", "vram": "8GiB"},
    {"gpu": "H100 80GB", "ram": "64GiB"},
)
# What a manifest says that bytes of the model do not follow from.
NOT_COMPARED = ("lowvram_version", "sha256")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(lowvram.__file__).parent / "demo" / "model",
        help="the checkpoint",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "stores": stores(options.source, Path(folder)),
            "frames": frames(Path(folder)),
            "plans": plans(),
        }
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def stores(source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Format -> file -> sha256, and the manifest itself."""
    found: dict[str, dict[str, Any]] = {}
    for format in FORMATS:
        model = folder / format
        lowvram.quantize(source, model, format)
        found[format] = {
            path.name: sha256(path.read_bytes())
            for path in sorted(model.glob("*"))
            if path.suffix != ".json"
        }
        manifest = json.loads((model / "lowvram.json").read_text(encoding="utf-8"))
        found[format]["lowvram.json"] = {
            name: value for name, value in manifest.items() if name not in NOT_COMPARED
        }
    return found


def frames(folder: Path) -> dict[str, str]:
    """Prompt -> sha256 of the frames."""
    found = {}
    for format, prompt, seed in PROMPTS:
        pipeline = lowvram.load(
            folder / format, vram="1GiB", ram="4GiB", device="cpu", prompt_cache=False
        )
        with pipeline.store:
            found[f"{format}, {prompt}"] = sha256(
                pipeline(prompt, seed=seed).frames.numpy().tobytes()
            )
    return found


def plans() -> dict[str, Any]:
    """40 requests -> the plan as JSON, or why there is none."""
    found: dict[str, Any] = {}
    for variant, (size, count), machine in itertools.product(
        ("t2v-a14b", "i2v-a14b"), SIZES, MACHINES
    ):
        format = "fp8" if count == 33 else "int8"
        key = f"{variant} {format} {size} {count} {machine}"
        try:
            found[key] = lowvram.plan(
                variant, size=size, frames=count, format=format, **machine
            ).to_dict()
        except Exception as error:  # refusals are compared too
            found[key] = f"{type(error).__name__}: {error}"
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
