"""Counts the hot loop of a kernel's machine code: which pipe of an SM takes how many cycles for one
trip, and what bound follows.

The model. One scheduler of an SM, of four, issues one warp instruction a cycle; a pipe takes some
cycles for each, by its lanes. The tensor cores take the loop's multiplications over the data
sheet's rate. Two bounds on the share of the tensor cores' peak:

- ideal: tensor time / the longest pipe, as if everything overlapped;
- serial: tensor time / (tensor time + the longest other pipe), as if a
  scheduler's warps never overlapped a product and what lies between.

Published speeds of SageAttention 1 and of flash attention in Triton lie at 0.73 to 1.23 of `serial`
(`static_bound.py --calibrate`). Not
modelled: latencies, DRAM, clocks under load, tails of waves, what bulk copies (UTMALDG) write to
shared memory.

Sources: NVIDIA's data sheets and tuning guides (SMs, clocks, dense rates, shared memory); lanes per
pipe from forums.developer.nvidia.com, topic 302018, and from published microbenchmarks (FFMA 4, ALU
2, MUFU 0.5 warp instructions per SM and cycle; 128 bytes of shared memory).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """A card of an architecture. int8 … fp8_half: multiplications per cycle and SM (data sheet's
    dense rate / 2 / SMs / boost clock).

    half: fp16 or bf16 into fp32; half_half: fp16 into fp16. fma: a scheduler's cycles for FFMA,
    FADD or FMUL.
    """

    name: str
    sms: int
    ghz: float
    shared_kb: int  # per SM
    int8: int
    half: int
    half_half: int
    fp8: int
    fp8_half: int
    fma: float = 1.0
    registers: int = 65536  # per SM

    def tops(self, kind: str) -> float:
        """The peak of one kind, 10^12 operations per second."""
        return 2 * int(getattr(self, kind)) * self.sms * self.ghz / 1e3


CARDS = {
    "sm_80": Card("A100", 108, 1.41, 164, 2048, 1024, 1024, 0, 0, fma=2.0),
    "sm_86": Card("RTX 3090", 82, 1.695, 100, 1024, 256, 512, 0, 0),
    "sm_89": Card("RTX 4090", 128, 2.52, 100, 1024, 256, 512, 512, 1024),
    "sm_90": Card("H100", 132, 1.83, 228, 4096, 2048, 2048, 4096, 4096),
    "sm_120": Card("RTX 5090", 170, 2.407, 100, 1024, 256, 512, 512, 1024),
}
ARCHES = tuple(CARDS)
PIPES = ("tensor", "issue", "fma", "alu", "xu", "lsu")
# Cycles of one scheduler per warp instruction: 16 lanes for the ALU and the heavy half of FMA, 4
# for MUFU and conversions.
ALU, HEAVY, XU = 2.0, 2.0, 8.0
LSU_BYTES = 128  # of shared memory per cycle and SM; a shuffle moves as much

_GROUPS = {
    "fma": "FFMA FADD FMUL",
    "fma2": "FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2",
    "heavy": "IMAD IDP UIMAD",
    "xu": "MUFU I2F F2I F2F POPC FLO BREV I2I FRND",
    "alu": "IADD3 IADD LOP3 LOP PRMT SHF SHL SHR FMNMX FMNMX3 SEL FSEL ISETP FSETP I2FP "
    "F2FP F2IP LEA MOV VIADD IABS SGXT PLOP3 VIMNMX"
    " VIMNMX3 IMNMX VIADDMNMX ISCADD BMSK CS2R FCHK FSWZADD HMNMX2 VABSDIFF P2R R2P HSETP2 VHMNMX",
    "lsu": "LDSM LDS STS STSM LDGSTS SHFL LDG STG ATOM RED LDL STL LD ST LDTM STTM",
    "mma": "HMMA IMMA QMMA HGMMA IGMMA QGMMA",
    "control": "BRA NOP BAR DEPBAR LDGDEPBAR WARPSYNC BSSY BSYNC BREAK EXIT S2R S2UR LDC LDCU "
    "R2UR VOTE SYNCS FENCE MEMBAR ERRBAR CCTL"
    " WARPGROUP ARRIVES ELECT NANOSLEEP YIELD CALL RET BMOV JMP",
}
_GROUP = {opcode: group for group, text in _GROUPS.items() for opcode in text.split()}
_MMA_SHAPES = {
    "16816": (16, 8, 16),
    "1688": (16, 8, 8),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
    "8816": (8, 8, 16),
}


class UnknownInstructionError(Exception):
    """A matrix instruction that the model cannot count."""


def group_of(opcode: str) -> str:
    """The pipe of an instruction: a key of `_GROUPS`; `control` for what only takes an issue slot;
    "" where nobody has classified it.
    """
    base = opcode.split(".")[0]
    if base.endswith("MMA") and _GROUP.get(base) != "mma":
        raise UnknownInstructionError(
            f"{opcode} is a matrix instruction that sass.py does not know: add its shape and rate"
        )
    return _GROUP.get(base) or ("control" if base.startswith("U") else "")


def multiplications(opcode: str) -> tuple[str, float]:
    """(field of `Card`, multiplications that one warp's share of a matrix instruction does). Raises
    `UnknownInstructionError`.
    """
    parts = opcode.split(".")
    base = parts[0]
    kinds = {"H": "half", "I": "int8", "Q": "fp8"}
    tile = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
    if base.endswith("GMMA") and tile:  # four warps share 64xNxK
        m, n, k = map(int, tile.groups())
        return kinds[base[0]], m * n * k / 4
    shape = next((part for part in parts if part in _MMA_SHAPES), None)
    if shape is None:
        raise UnknownInstructionError(f"{opcode}: a shape that sass.py does not know")
    m, n, k = _MMA_SHAPES[shape]
    kind = kinds[base[0]]
    if base == "HMMA" and "F32" not in parts:
        kind = "half_half"
    if base == "QMMA" and "F16" in parts:
        kind = "fp8_half"
    return kind, float(m * n * k)


def shared_bytes(opcode: str) -> float:
    """Bytes of shared memory that one warp instruction moves; a shuffle counts as one pass."""
    parts = opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 128.0 * (4 if "4" in parts else 2 if "2" in parts else 1)
    if parts[0] == "SHFL":
        return float(LSU_BYTES)
    return 32.0 * (16 if "128" in parts else 8 if "64" in parts else 4)


def wgmma_bytes(opcode: str, operands: str) -> float:
    """Bytes that one warp's share of a wgmma reads from shared memory: a quarter of B, and of A
    where it lies there.
    """
    tile = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
    if tile is None:
        raise UnknownInstructionError(f"{opcode}: a wgmma without a shape")
    m, n, k = map(int, tile.groups())
    sources = [part.strip() for part in operands.split(",")]
    from_registers = len(sources) > 1 and sources[1].startswith("R")
    return (n * k + (0 if from_registers else m * k)) * (2 if opcode.startswith("H") else 1) / 4


@dataclass
class Loop:
    """The hot loop of a kernel. opcodes: full opcode -> times, per warp; work: field of `Card` ->
    multiplications per warp and trip.
    """

    opcodes: Counter[str] = field(default_factory=Counter)
    work: dict[str, float] = field(default_factory=dict)
    operand_bytes: float = 0.0  # that a warp's share of its wgmmas reads from shared memory

    @property
    def unclassified(self) -> list[str]:
        """Opcodes that count as an issue slot and nothing else because nobody has said which pipe
        runs them.
        """
        return sorted({opcode.split(".")[0] for opcode in self.opcodes if not group_of(opcode)})

    def cycles(self, card: Card, warps: int) -> dict[str, float]:
        """Cycles of one scheduler, or of the SM for lsu, that a trip of one block takes."""
        cost = dict.fromkeys(PIPES, 0.0)
        per_scheduler = warps / 4
        for opcode, count in self.opcodes.items():
            group = group_of(opcode)
            cost["issue"] += count * per_scheduler
            if group == "fma":
                cost["fma"] += count * card.fma * per_scheduler
            elif group == "fma2":
                cost["fma"] += count * HEAVY * per_scheduler
            elif group == "heavy":
                cost["fma"] += count * (HEAVY if card.fma == HEAVY else HEAVY / 2) * per_scheduler
            elif group == "xu":
                cost["xu"] += count * XU * per_scheduler
            elif group == "alu":
                cost["alu"] += count * ALU * per_scheduler
            elif group == "lsu":
                cost["lsu"] += count * shared_bytes(opcode) * warps / LSU_BYTES
        cost["lsu"] += self.operand_bytes * warps / LSU_BYTES
        for kind, work in self.work.items():
            cost["tensor"] += work * warps / getattr(card, kind)
        return cost


Instruction = tuple[str, str, str]  # (label or "", opcode, operands)
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def parse(sass: str) -> list[Instruction]:
    """The instructions and labels of `nvdisasm -c`, in order."""
    lines: list[Instruction] = []
    for text in sass.splitlines():
        label, instruction = _LABEL.match(text), _LINE.match(text)
        if label:
            lines.append((label[1], "", ""))
        elif instruction:
            lines.append(("", instruction[2], instruction[3]))
    return lines


def loops(lines: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) of the body of every backward branch."""
    place = {label: index for index, (label, _, _) in enumerate(lines) if label}
    found = []
    for index, (_, opcode, operands) in enumerate(lines):
        target = re.search(r"`\((\.L_x_\d+)\)", operands) if opcode.split(".")[0] == "BRA" else None
        if target and place.get(target[1], index) < index:
            found.append((place[target[1]], index))
    return found


def hot_loop(sass: str) -> Loop | None:
    """The innermost loop with the most matrix multiplications; None where a kernel has none. Raises
    `UnknownInstructionError`.
    """
    lines = parse(sass)
    bodies = [
        (first, last)
        for first, last in loops(lines)
        if any(opcode and group_of(opcode) == "mma" for _, opcode, _ in lines[first:last])
    ]
    inner = [
        body
        for body in bodies
        if not any(
            other != body and body[0] <= other[0] and other[1] <= body[1] for other in bodies
        )
    ]
    found = [_loop(lines[first : last + 1]) for first, last in inner]
    return max(found, key=lambda loop: sum(loop.work.values()), default=None)


def _loop(lines: list[Instruction]) -> Loop:
    loop = Loop()
    for _, opcode, operands in lines:
        if not opcode:
            continue
        loop.opcodes[opcode] += 1
        if group_of(opcode) == "mma":
            kind, work = multiplications(opcode)
            loop.work[kind] = loop.work.get(kind, 0.0) + work
            loop.operand_bytes += wgmma_bytes(opcode, operands) if "GMMA" in opcode else 0.0
    return loop
