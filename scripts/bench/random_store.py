"""A store of random weights in A14B's shapes, written by the project's own writer: one block's
random codes, shifted by another amount in every block.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.files.write import check_room
from lowvram.store.layout import StoredTensor, component_layout, marker_bytes
from lowvram.store.manifest import TOKENIZER_NAME, ComponentManifest, Manifest, component_file
from lowvram.store.reader import Store, open_store
from lowvram.store.writer import JOURNAL, StoreWriter
from lowvram.variants import COMPONENTS, T2V_A14B, ModelConfig, VAEConfig

FORMAT = "int8"
INT8_STD = 73.3  # of codes drawn evenly from -127 .. 127


def bench_config(layers: int) -> ModelConfig:
    """Experts of A14B's shapes; the parts that no step uses are as small as their code allows."""
    text = replace(T2V_A14B.text_encoder, vocab_size=256, num_layers=1, d_ff=256)
    vae = VAEConfig(base_dim=8, num_res_blocks=1)
    return replace(
        T2V_A14B,
        variant="t2v-custom",
        dit=replace(T2V_A14B.dit, num_layers=layers),
        text_encoder=text,
        vae=vae,
    )


def write_random_store(path: Path, config: ModelConfig, tokenizer: bytes = b"{}") -> Store:
    """A store whose weights have the variance of a trained model's, so that latents stay finite.
    Raises `DiskFullError`.

    tokenizer: the file's bytes; what the default says cannot read a prompt.
    """
    layouts = {component: component_layout(component, config, FORMAT) for component in COMPONENTS}
    path.mkdir(parents=True, exist_ok=True)
    check_room(path / TOKENIZER_NAME, sum(layout.total_bytes for layout in layouts.values()))
    base: dict[tuple[object, ...], Tensor] = {}
    widths: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    files = {}
    for component, layout in layouts.items():
        with StoreWriter(
            path / component_file(component), layout.tensors, layout.metadata(), {}, resume=False
        ) as writer:
            for number, tensor in enumerate(layout.tensors):
                if tensor.role == "weight":
                    widths[tensor.name] = tensor.shape[1]
                kind = re.sub(r"^blocks\.\d+\.", "", tensor.name), tensor.dtype, tensor.shape
                if kind not in base:
                    base[kind] = _random(
                        tensor, layout.format, widths.get(tensor.source, 1), generator
                    )
                codes = base[kind]
                writer.write(
                    codes.flatten().roll(number).view(codes.shape)
                    if tensor.role == "weight"
                    else codes
                )
            files[component] = ComponentManifest(
                component_file(component), writer.header_sha256, writer.finish()
            )
    (path / TOKENIZER_NAME).write_bytes(tokenizer)
    digest = hashlib.sha256(tokenizer).hexdigest()
    Manifest(config, FORMAT, {"format": FORMAT}, {"layout": "random"}, files, digest, "0").write(
        path
    )
    for journal in path.glob(f"*{JOURNAL}"):
        journal.unlink()
    return open_store(path)


def _random(tensor: StoredTensor, format: str, width: int, generator: torch.Generator) -> Tensor:
    if tensor.role == "marker":
        return torch.frombuffer(bytearray(marker_bytes(format)), dtype=torch.uint8)
    if tensor.role == "weight":
        return torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
    dtype = TORCH_DTYPES[tensor.dtype]
    if tensor.role == "scale":
        return torch.full(tensor.shape, width**-0.5 / INT8_STD, dtype=dtype)
    if "norm" in tensor.name or tensor.name.endswith("gamma"):
        return torch.ones(tensor.shape, dtype=dtype)
    values = torch.randn(tensor.shape, generator=generator)
    return (values * (0.02 if values.ndim == 1 else values[0].numel() ** -0.5)).to(dtype)
