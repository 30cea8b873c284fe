"""What the devices of a compiled program send each other, read from its HLO text.

A collective inside a loop runs as often as the loop does, which XLA writes beside the loop where it
knows the number.
"""

import math
import re
import typing

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|true_computation|false_computation)="
                     r"%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OPERATION = re.compile(r"= (\(.*?\)|\S+) (" + "|".join(KINDS) + r")(?:-start)?\(")
_ARRAY = re.compile(r"(\w+?\d*)\[([\d,]*)\]")
_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH = re.compile(r"replica_groups=(?:@?[\w.]*)?mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Collective(typing.NamedTuple):
    """One collective operation. size: bytes of its result on a device; group: devices that take
    part together; times: how often a step runs it; sent: bytes that a device sends each time;
    where: the operation of the model that it belongs to."""

    kind: str
    size: int
    group: int
    times: int
    sent: float
    where: str


def collectives(hlo_text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`) with more than one device.

    Bytes sent are the least that ring algorithms need among n devices: of an array of S bytes
    2 (n - 1) / n S to sum it, (n - 1) / n S to gather or exchange it. Bodies of loops of unknown
    length count once. Raises ValueError where the groups of an operation cannot be read.
    """
    lines_of, entry = _computations(hlo_text)
    found: list[Collective] = []

    def walk(name, times):
        for line in lines_of.get(name, ()):
            operation = _OPERATION.search(line)
            if operation:
                one = _collective(operation, line, times)
                found.extend([one] if one.group > 1 else [])
                continue
            trips = _TRIPS.search(line) if " while(" in line else None
            branches = _BRANCHES.search(line)
            names = _CALLED.findall(line)
            names += branches[1].replace("%", "").split(", ") if branches else []
            for called in names:
                walk(called, times * (int(trips[1]) if trips else 1))

    walk(entry, 1)
    return found


def totals(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """{kind: (times, bytes sent by a device)} of a step, the kinds that occur."""
    return {kind: (sum(one.times for one in found if one.kind == kind),
                   sum(one.times * one.sent for one in found if one.kind == kind))
            for kind in KINDS if any(one.kind == kind for one in found)}


def _computations(text):
    lines_of, entry, current = {}, "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start[2]
            lines_of[current] = []
            entry = current if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            lines_of[current].append(line)
    return lines_of, entry


def _collective(operation, line, times) -> Collective:
    kind = operation[2]
    # An asynchronous start gives (operand, result): the larger is the whole array.
    sizes = [_bytes(*array) for array in _ARRAY.findall(operation[1])]
    begun = f"{kind}-start(" in line and kind != "all-reduce"
    size = max(sizes) if begun else sum(sizes)
    group = _group(kind, line)
    share = (group - 1) / group
    sent = {"all-reduce": 2 * share * size, "all-gather": share * size,
            "reduce-scatter": (1 if begun else group) * share * size, "all-to-all": share * size,
            "collective-permute": size}[kind]
    where = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, group, times, float(sent), where[1] if where else "")


def _bytes(dtype, dims) -> int:
    bits = {"pred": 8, "bf16": 16}.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype))
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def _group(kind, line) -> int:
    """Devices of a group; of a permutation 2 where anything moves between devices."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line[line.index("source_target_pairs"):])
        return 1 + any(source != target for source, target in pairs)
    if found := _LIST.search(line):
        return len(found[1].split(","))
    if found := _IOTA.search(line):
        return int(found[1])
    if found := _MESH.search(line):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
        # Part of an axis is written 'axis':(devices before it)devices.
        named = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", found[2])
        return int(np.prod([int(part or sizes[name]) for name, part in named]))
    raise ValueError(f"no groups of devices in: {line.strip()[:300]}")
