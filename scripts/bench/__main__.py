"""The benchmarks: every answer that a GPU can give with one command, or one of them at length.

From the root of the repository:

    python -m scripts.bench all --seconds 540 --out FOLDER     every question in order of its worth, within the time
    python -m scripts.bench all --rehearse --out FOLDER        the same on a CPU at toy sizes; nothing that it writes is a result
    python -m scripts.bench kernels | block | stream           one benchmark at length; --help shows its options
    python -m scripts.bench whole                              all of A14B at its true size, within budgets that the kernel enforces
    python -m scripts.bench quantize | vae                     the quantizer at true shapes; the tiles of the VAE
    python -m scripts.bench hashes                             what the comparison of a store with its hashes costs

Needs torch, and nothing of lowvram installed. `all` leaves out what needs a package
that is not there and says so.
"""

from __future__ import annotations

import sys
from importlib import import_module

# The module of each command; what is not named here is one of `scripts.bench.commands`.
COMMANDS = {
    "all": "run_all",
    "step": "steps",  # a process that `all` starts
    "whole": "whole",
    "quantize": "quantize",
    "vae": "vae",
    "hashes": "hashes",
}


def main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command in COMMANDS:
        return int(import_module(f"scripts.bench.{COMMANDS[command]}").main(arguments[1:]))
    return int(import_module("scripts.bench.commands").main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
