"""Measures the quantizer on one expert of the real A14B shapes: peak memory, seconds, and what
copying the same bytes takes.

    python -m scripts.bench quantize --work build/bench            # 57 GB of fp32 in sparse shards, 15 GB written
    python -m scripts.bench quantize --work build/bench --blocks 2

The source has the official layout and is sparse: reading it costs no disk, so the times show the
quantizer, not the disk. Prints JSON and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lowvram_quantize.build import Build
from lowvram_quantize.convert import check_finite
from lowvram_quantize.journal import RunJournal
from lowvram_quantize.progress import QUANTIZE, Meter
from lowvram_quantize.recipe import Recipe, run_identity
from lowvram_quantize.rows import RowEngine

from lowvram.checkpoint.names import Shape, dit_shapes, text_encoder_shapes, vae_shapes
from lowvram.checkpoint.readers.safetensors_header import read_header
from lowvram.checkpoint.source import Source, open_source
from lowvram.memory.usage import peak_rss_bytes
from lowvram.store.layout import StoredTensor, component_layout
from lowvram.store.manifest import STAGING_NAME
from lowvram.store.writer import header_bytes
from lowvram.variants import EXPERTS, T2V_A14B, ModelConfig

COPY_BYTES = 16 * 2**20


def write_sparse_source(path: Path, config: ModelConfig, shards: int) -> None:
    """The official layout with fp32 experts, whose weights are zeros that take no room on the disk.

    One weight is not, since equal experts are refused.
    """
    for expert in EXPERTS:
        folder = path / f"{expert}_model"
        folder.mkdir(parents=True)
        _write_sparse_shards(folder, dit_shapes(config.dit), shards)
        data = {key: value for key, value in asdict(config.dit).items() if key != "patch_size"}
        (folder / "config.json").write_text(json.dumps({"model_type": "t2v"} | data))
    folder = path / "low_noise_model"
    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    smallest, file = min(
        ((info, header.path) for header in headers for info in header.tensors.values()),
        key=lambda found: found[0].nbytes,
    )
    with open(file, "r+b") as opened:
        opened.seek(smallest.start)
        opened.write(struct.pack("<f", 1.0))
    write_sparse_file(
        path / "models_t5_umt5-xxl-enc-bf16.safetensors",
        text_encoder_shapes(config.text_encoder),
        "BF16",
    )
    write_sparse_file(path / "Wan2.1_VAE.safetensors", vae_shapes(config.vae), "F32")
    tokenizer = path / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text("{}")


def _write_sparse_shards(folder: Path, shapes: dict[str, Shape], shards: int) -> None:
    names = list(shapes)
    step = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * step : (number + 1) * step]
        write_sparse_file(folder / file, {name: shapes[name] for name in part}, "F32")
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse_file(path: Path, shapes: dict[str, Shape], dtype: str) -> None:
    tensors = [StoredTensor(name, dtype, shape, "copy", name) for name, shape in shapes.items()]
    header = header_bytes(tensors, {})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(tensor.nbytes for tensor in tensors))


def limited(blocks: int) -> ModelConfig:
    """A14B, or its first blocks with a text encoder of one block."""
    if blocks == T2V_A14B.dit.num_layers:
        return T2V_A14B
    text = replace(T2V_A14B.text_encoder, vocab_size=256, num_layers=1)
    return replace(
        T2V_A14B,
        variant="t2v-custom",
        dit=replace(T2V_A14B.dit, num_layers=blocks),
        text_encoder=text,
    )


def measure(source: Source, work: Path, format: str, threads: int | None) -> dict[str, float]:
    """Seconds to search one expert for NaN and to quantize it into `work`; peak memory of the
    process so far.
    """
    layouts = {"high_noise": component_layout("high_noise", source.config, format)}
    recipe = Recipe(format)
    build = Build(source, recipe, layouts, run_identity(recipe, source), work / STAGING_NAME)
    one = replace(source, components={"high_noise": source.components["high_noise"]})
    build.staging.mkdir(parents=True)
    with (
        RowEngine(threads) as engine,
        RunJournal(build.staging / "run.jsonl", build.identity) as state,
    ):
        start_s = time.monotonic()
        check_finite(one, engine)
        scan_s = time.monotonic() - start_s
        build.component(
            "high_noise", engine, state, Meter(QUANTIZE, layouts["high_noise"].total_bytes, None)
        )
        quantize_s = time.monotonic() - start_s - scan_s
    source_bytes = sum(info.nbytes for info in source.components["high_noise"].tensors.values())
    return {
        "threads": engine.threads,
        "source_gb": source_bytes / 1e9,
        "stored_gb": layouts["high_noise"].total_bytes / 1e9,
        "scan_s": scan_s,
        "quantize_s": quantize_s,
        "source_gb_per_s": source_bytes / 1e9 / (scan_s + quantize_s),
        "peak_rss_gb": (peak_rss_bytes() or 0) / 1e9,  # 0: the system does not say
        "largest_tensor_gb": 4
        * max(math.prod(shape) for shape in dit_shapes(source.config.dit).values())
        / 1e9,
    }


def copy_times(sources: Sequence[Path], stored: Path) -> dict[str, float]:
    """Seconds to read the source once, and to copy the stored file to another, synced."""
    start_s = time.monotonic()
    buffer = bytearray(COPY_BYTES)
    for path in sources:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read_s = time.monotonic() - start_s
    copy = stored.with_suffix(".copy")
    with open(stored, "rb") as old, open(copy, "wb") as new:
        shutil.copyfileobj(old, new, COPY_BYTES)
        os.fsync(new.fileno())
    copy_s = time.monotonic() - start_s - read_s
    copy.unlink()
    return {"read_source_s": read_s, "copy_stored_s": copy_s}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder to make; it is removed at the end"
    )
    parser.add_argument("--blocks", type=int, default=T2V_A14B.dit.num_layers)
    parser.add_argument("--format", default="int8")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    source, result = (
        options.work / "source",
        {"format": options.format, "blocks": options.blocks},
    )
    options.work.mkdir(parents=True)
    try:
        write_sparse_source(source, limited(options.blocks), shards=6)
        with open_source(source) as opened:
            result |= measure(opened, options.work, options.format, options.threads)
        shards = sorted((source / "high_noise_model").glob("*.safetensors"))
        result |= copy_times(shards, options.work / STAGING_NAME / "high_noise.safetensors")
        result |= {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        print(
            json.dumps(
                {
                    key: round(value, 3) if isinstance(value, float) else value
                    for key, value in result.items()
                },
                indent=1,
            )
        )
    finally:
        shutil.rmtree(options.work)
    return 0
