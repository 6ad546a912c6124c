"""Tables of `lowvram inspect` and `lowvram doctor`."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from lowvram.cli.terminal import printable
from lowvram.units import format_bytes


def inspect_table(report: dict[str, Any]) -> Table:
    """Table of tensors, bytes and dtypes: a row per component, or one row for a single file.

    report: from `lowvram.store.inspect.inspect_path`.
    """
    title = {"store": "quantized model", "source": f"{report.get('layout')} checkpoint"}.get(
        report["kind"], report["kind"]
    )
    facts = [str(report[key]) for key in ("format", "dialect", "component") if report.get(key)]
    heading = f"{report['path']}: {', '.join([title, *facts])}"
    table = Table(title=printable(heading))
    for name in ("component", "tensors", "bytes", "dtypes"):
        table.add_column(name, justify="left" if name in ("component", "dtypes") else "right")
    single = {report.get("component") or "file": report}
    for component, part in report.get("components", single).items():
        dtypes = ", ".join(
            f"{dtype} {format_bytes(entry['bytes'])}"
            for dtype, entry in part.get("dtypes", {}).items()
        )
        table.add_row(
            printable(component),
            f"{part['tensors']:,}" if "tensors" in part else "-",
            format_bytes(part["bytes"]),
            printable(dtypes or part.get("note", "")),
        )
    if report.get("lora"):
        table.caption = _lora_caption(report["lora"])
    if report.get("config"):
        dit = report["config"]["dit"]
        sizes = (
            f"{dit['num_layers']} blocks, dim {dit['dim']}, ffn {dit['ffn_dim']}, "
            f"{dit['num_heads']} heads"
        )
        table.caption = f"{printable(report['config']['variant'])}: {sizes}"
    if report.get("verified"):
        table.caption = f"{table.caption}; the hash of every tensor matches"
    return table


def _lora_caption(lora: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, lora["ranks"]))
    changes = f"changes {lora['tensors_changed']} tensors of a T2V-A14B expert"
    changes += f" ({', '.join(lora['kinds'])}" if lora["kinds"] else ""
    changes += f"; rank {ranks})" if ranks else ")" if lora["kinds"] else ""
    if lora["unknown_keys"]:
        changes += f"; {lora['unknown_keys']} keys are of none: {', '.join(lora['unknown'])}"
    return printable(changes)


def doctor_table(report: dict[str, Any]) -> Table:
    """Table of findings, with status, detail and advice.

    report: from `lowvram.doctor.report.doctor_report`.
    """
    table = Table(title="lowvram doctor")
    for name in ("what", "status", "detail", "advice"):
        table.add_column(name, overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "missing": "red"}
    for finding in report["findings"]:
        status = finding["status"]
        table.add_row(
            finding["name"],
            Text(status, styles[status]),
            printable(finding["detail"]),
            printable(finding["advice"]),
        )
    return table
