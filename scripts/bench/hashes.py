"""What the comparison of a store with its hashes costs: `python -m scripts.bench hashes`.

- the demo: the bundled model's clip, with and without the comparison, in turns;
- a run whose blocks have A14B's shapes (random values, few layers), the same;
- true shapes: a file of A14B's blocks (random values) streamed from the disk and consumed at once,
  which hides nothing, with and without the comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from lowvram_quantize.convert import quantize

from lowvram.demo.run import MODEL
from lowvram.hardware.cgroups import cpu_count
from lowvram.memory.arena import Ledger
from lowvram.pipeline import Pipeline, load
from lowvram.planner.workspace import READ_SLACK_BYTES
from lowvram.store.hashes import TensorHashes
from lowvram.store.reader import Store, StoreFile, open_store
from lowvram.streaming.stream import Buffers, open_stream
from lowvram.streaming.transport import make_transport
from lowvram.variants import EXPERTS
from scripts.bench.random_store import bench_config, write_random_store

OUTPUT = Path("docs/benchmarks/hashes.json")
CPU = torch.device("cpu")
PROMPT = "a red circle moves right on a white background"


@contextmanager
def without_hashes(files: Mapping[str, StoreFile]) -> Iterator[None]:
    """Read without comparing."""
    kept = {name: file.hashes for name, file in files.items()}
    for file in files.values():
        file.hashes = None
    try:
        yield
    finally:
        for name, file in files.items():
            file.hashes = kept[name]


def forget(store: Store) -> None:
    """Compare everything again at the next reading."""
    for name, file in store.files.items():
        file.hashes = TensorHashes(file.path, store.manifest.components[name].tensors)


def in_turns(store: Store, runs: int, work: Callable[[], float]) -> dict[str, list[float]]:
    """What `work` returns, with and without the comparison, each `runs` times."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(2 * runs):
        compared = number % 2 == 0
        forget(store)
        with nullcontext() if compared else without_hashes(store.files):
            found["with" if compared else "without"].append(work())
    return found


def seconds_of(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def demo(runs: int) -> dict[str, list[float]]:
    """Seconds of the demo's clip, with and without the comparison, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        quantize(MODEL, Path(folder) / "model")
        pipeline = load(Path(folder) / "model", device="cpu", prompt_cache=False)
        with pipeline.store as store:
            request = pipeline.request(PROMPT)
            pipeline.generate(request)  # libraries load
            return in_turns(store, runs, lambda: seconds_of(lambda: pipeline.generate(request)))


def true_shapes(folder: Path, layers: int, runs: int) -> dict[str, object]:
    """Seconds per block of A14B's shapes, streamed and consumed at once."""
    path = folder / "store"
    config = bench_config(layers)
    store = open_store(path) if path.exists() else write_random_store(path, config)
    blocks = [(name, index) for name in EXPERTS for index in range(layers)]
    slot_bytes = store.files[EXPERTS[0]].blocks[0].nbytes + READ_SLACK_BYTES
    buffers, ledger = Buffers(slot_bytes, 0, 3, 0, 0), Ledger("bench", 2**40)

    def stream() -> float:
        with open_stream(
            store.files, blocks, buffers, ledger, ledger, CPU, make_transport(CPU)
        ) as streamer:
            began = time.perf_counter()
            for name, index in blocks:
                with streamer.block(name, index):
                    pass
            return (time.perf_counter() - began) / len(blocks)

    with store:
        seconds = in_turns(store, runs, stream)
    return {"block_bytes": slot_bytes - READ_SLACK_BYTES, "seconds_per_block": seconds}


def run_of_true_shapes(folder: Path, layers: int, runs: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a whole run across the expert switch, whose blocks have A14B's shapes."""
    path = folder / "store"
    config = bench_config(layers)
    tokenizer = (MODEL / "google/umt5-xxl/tokenizer.json").read_bytes()
    store = open_store(path) if path.exists() else write_random_store(path, config, tokenizer)
    with store:
        pipeline = Pipeline(store, CPU, 2**40, 2**40, 10**9)
        request = pipeline.request("a circle", size=(320, 192), num_frames=5, steps=steps)
        return in_turns(store, runs, lambda: seconds_of(lambda: pipeline.generate(request)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench hashes", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for a store of 6 GB; kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--run-runs", type=int, default=1, help="runs of true shapes")
    parser.add_argument("--steps", type=int, default=40, help="of the run of true shapes")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(cpu_count())
    found = {
        "machine": {"cpus": cpu_count(), "system": platform.system(), "torch": torch.__version__},
        "layers": options.layers,
        "steps_of_the_run": options.steps,
        "demo_seconds": demo(options.runs),
        "run_of_true_shapes_seconds": run_of_true_shapes(
            options.folder, options.layers, options.run_runs, options.steps
        ),
        "true_shapes": true_shapes(options.folder, options.layers, options.runs),
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for what in ("demo_seconds", "run_of_true_shapes_seconds"):
        runs = found[what]
        assert isinstance(runs, dict)
        for name, values in runs.items():
            print(f"{what} {name}: median {statistics.median(values):.2f}")
    shapes = found["true_shapes"]
    assert isinstance(shapes, dict)
    for name, values in shapes["seconds_per_block"].items():
        print(f"block of {shapes['block_bytes']} bytes {name}: {statistics.median(values):.3f} s")
    return 0
