"""The benchmarks: every answer that a GPU can give with one command, or one of them at length.

    python scripts/bench.py all --seconds 540 --out FOLDER     every question in order of its worth, within the time
    python scripts/bench.py all --rehearse --out FOLDER        the same on a CPU at toy sizes; nothing that it writes is a result
    python scripts/bench.py kernels | block | stream           one benchmark at length; --help shows its options

Needs torch, and nothing of lowvram installed: this file finds the packages beside it. `all` leaves
out what needs a package that is not there and says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", ".", "kernels", "quantize")]


def main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command == "all":
        import bench_all

        return bench_all.main(arguments[1:])
    if command == "step":  # a process that `all` starts
        import bench_steps

        return bench_steps.main(arguments[1:])
    import bench_commands

    return bench_commands.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
