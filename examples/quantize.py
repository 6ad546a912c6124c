"""Quantize a checkpoint: python examples/quantize.py SOURCE MODEL"""

import sys
from pathlib import Path

import lowvram

report = lowvram.quantize(Path(sys.argv[1]), Path(sys.argv[2]), format="int8", resume=True)
print(f"{report.source_bytes / 1e9:.2f} GB became {report.stored_bytes / 1e9:.2f} GB")
