"""What a compiled program does, read from XLA's optimized HLO text: FLOPs, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, however often it runs; here every instruction counts as
often as the loops around it turn.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}  # others end in their bits
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They move nothing by themselves; what they call or wait for is counted where it stands.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "iota",
    ]
)

# Matrix products of (seq x head_dim) with (head_dim x seq) in each of splash attention's kernels.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition)=%([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A dense array."""

    dtype: str
    dimensions: tuple[int, ...]
    on_chip: bool  # held in the core's own memory (TPU: layouts with S(1) and above), no traffic to HBM

    @property
    def bytes(self) -> int:
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.sub(r"^[a-z]+(\d+).*", r"\1", self.dtype))
        return math.prod(self.dimensions) * bits // 8


@dataclasses.dataclass
class Instruction:
    """One line of HLO."""

    name: str
    shapes: list[Shape]  # of the result, a tuple's one after the other
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Computations that it calls."""
        names = []
        for one, several in _CALLED.findall(self.attributes):
            names += [one] if one else re.findall(r"%([\w.\-]+)", several)
        return names


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Cost:
    """Of one device, for one execution of the program."""

    flops: float = 0.0
    bytes: float = 0.0  # to and from HBM
    # {(kind, bytes that one device sends, devices in its group, whether it leaves the slice): executions}
    collectives: collections.Counter[tuple[str, int, int, bool]] = dataclasses.field(
        default_factory=collections.Counter
    )
    # Custom calls whose FLOPs aren't known.
    uncounted_kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: int = 0  # whose trip count can't be read, taken as 1

    def add(self, other: "Cost", times: float) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.unknown_loops += other.unknown_loops
        for key, count in other.collectives.items():
            self.collectives[key] += int(times * count)
        for name, count in other.uncounted_kernels.items():
            self.uncounted_kernels[name] += int(times * count)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({name: computation}, the entry's name) of an HLO module's text."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = computations[start[1]] = {}
            if line.startswith("ENTRY"):
                entry = start[1]
        elif found := _INSTRUCTION.match(line):
            name, rest = found.groups()
            current[name] = _instruction(name, rest)
    if not entry:
        raise ValueError("no HLO module: it has no ENTRY")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    operands = re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(name, list(_shapes(shapes)), opcode, operands, rest[:end] + rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing bracket in {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dimensions, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dimensions.split(",") if size)
        yield Shape(dtype, sizes, space is not None and space[1] != "0")


class Program:
    """An optimized HLO module, costed bottom up."""

    def __init__(self, text: str, slices: int = 1, devices: int = 1):
        self.computations, self.entry = parse(text)
        self._per_slice, self._slices = max(1, devices // slices), slices
        self._devices = devices
        self._known: dict[str, Cost] = {}

    def cost(self) -> Cost:
        """Of the whole program."""
        return self._cost(self.entry)

    def _cost(self, name: str) -> Cost:
        if name in self._known:
            return self._known[name]
        computation, total = self.computations[name], Cost()
        for instruction in computation.values():
            times = 1.0
            if instruction.opcode == "while":
                trips = self._trips(instruction)
                total.unknown_loops += trips is None
                times = float(trips or 1)
            if instruction.opcode in ("while", "conditional", "call") or instruction.opcode.startswith("async"):
                for called in instruction.called:
                    total.add(self._cost(called), times)
                continue
            if instruction.opcode == "fusion":
                for called in instruction.called:
                    # A fusion's intermediate values never reach HBM.
                    inner = dataclasses.replace(self._cost(called), bytes=0.0)
                    if called.startswith("all-reduce-scatter"):  # what a TPU calls a reduce-scatter
                        inner.collectives = collections.Counter(
                            {
                                ("reduce-scatter", moved // 2, devices, far): times
                                for (_, moved, devices, far), times in inner.collectives.items()
                            }
                        )
                    total.add(inner, 1)
            total.add(self._own(instruction, computation), 1)
        self._known[name] = total
        return total

    def _own(self, instruction: Instruction, computation: Computation) -> Cost:
        opcode, cost = instruction.opcode, Cost()
        if opcode == "dot":
            cost.flops = _dot(instruction, computation)
        elif opcode == "convolution":
            cost.flops = _convolution(instruction, computation)
        elif opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            if target and target[1] == "tpu_custom_call":
                kernel = next((k for k in KERNELS if k in instruction.name), None)
                if kernel:
                    cost.flops = _attention(instruction, computation, KERNELS[kernel])
                else:
                    cost.uncounted_kernels[name[1] if name else target[1]] = 1
            elif target and not target[1][0].islower():
                return cost  # AllocateBuffer, ConcatBitcast and their like move nothing
        base = opcode.removesuffix("-start")
        if base in COLLECTIVES:
            cost.collectives[self._collective(base, instruction, computation)] = 1
        elif opcode == "send":  # through the hosts: how TPUs reduce between slices
            moved = sum(shape.bytes for shape in computation[instruction.operands[0]].shapes)
            cost.collectives["send", moved, self._slices, True] = 1
        if opcode not in FREE and not opcode.endswith("-done"):
            cost.bytes = self._traffic(instruction, computation)
        return cost

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop turns: what XLA wrote beside it, or what its counter tells; None: not known."""
        if known := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes):
            return int(known[1])
        condition, body = (
            self.computations[name[1]]
            for key in ("condition", "body")
            if (name := re.search(rf"{key}=%([\w.\-]+)", loop.attributes))
        )
        limits = self._constants(condition)
        counters = {
            int(index[1])
            for i in condition.values()
            if i.opcode == "get-tuple-element" and (index := re.search(r"index=(\d+)", i.attributes))
        }
        if len(limits) != 1 or len(counters) != 1:
            return None
        root = list(body.values())[-1]
        counter = body[root.operands[counters.pop()]] if root.opcode == "tuple" else None
        if counter is None:
            return None
        # XLA unrolls some loops by counting in twos.
        steps = self._constants({name: body[name] for name in (counter.name, *counter.operands)})
        return -(-limits.pop() // steps.pop()) if len(steps) == 1 else None

    def _constants(self, computation: Computation) -> set[int]:
        """The whole numbers in a computation and in the fusions that it calls."""
        found = set()
        for i in computation.values():
            if i.opcode == "constant" and i.shapes[0].dtype in ("s32", "u32"):
                found |= {int(number) for number in re.findall(r"^\s*(\d+)", i.attributes)}
            elif i.opcode == "fusion":
                found |= self._constants(self.computations[i.called[0]])
        return found

    def _collective(self, kind: str, instruction: Instruction, computation: Computation):
        inputs = sum(shape.bytes for name in instruction.operands for shape in computation[name].shapes)
        outputs = sum(shape.bytes for shape in instruction.shapes)
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes)
            far = any(int(a) // self._per_slice != int(b) // self._per_slice for a, b in pairs)
            return kind, inputs, 2, far
        group = self._group(instruction.attributes)
        size = len(group)
        if kind == "all-gather":
            moved = inputs * (size - 1)
        elif kind == "all-reduce":
            moved = 2 * inputs * (size - 1) // size
        else:
            moved = max(inputs, outputs if kind == "all-to-all" else 0) * (size - 1) // size
        return kind, moved, size, len({device // self._per_slice for device in group}) > 1

    def _group(self, attributes: str) -> list[int]:
        """The devices of the first replica group."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return [int(device) for device in listed[1].split(",")]
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
        if not iota:
            return list(range(self._devices))
        order = np.arange(self._devices).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            order = order.transpose([int(n) for n in iota[4].split(",")])
        return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that pass between HBM and the core."""
        opcode = instruction.opcode
        # Of a start's tuple, the first array is the operand again and the rest are handles.
        results = instruction.shapes if not opcode.endswith("-start") else instruction.shapes[:1]
        if opcode in ("dynamic-slice", "gather", "slice"):
            return sum(2 * s.bytes for s in results if not s.on_chip)
        if opcode in ("slice-start", "dynamic-slice-start"):
            return sum(s.bytes * (1 if s.on_chip else 2) for s in instruction.shapes[1:2])
        if opcode in ("dynamic-update-slice", "scatter"):
            update = computation[instruction.operands[1 if opcode == "dynamic-update-slice" else 2]]
            return sum(2 * s.bytes for s in update.shapes)
        written = sum(s.bytes for s in results if not s.on_chip)
        read = 0.0
        inner = self.computations[instruction.called[0]] if opcode == "fusion" else None
        for number, name in enumerate(instruction.operands):
            used = self._sliced(inner, number) if inner else None
            for shape in computation[name].shapes:
                if not shape.on_chip:
                    read += shape.bytes if used is None else min(used, shape.bytes)
        if inner and (updates := _updates(inner)):
            # Updated in place: the slice is written, the rest isn't touched.
            whole = sum(i.shapes[0].bytes for i in updates)
            small = sum(inner[i.operands[1]].shapes[0].bytes for i in updates)
            written = max(0, written - whole) + small
        return read + written

    def _sliced(self, fusion: Computation, number: int) -> int | None:
        """Bytes of a fusion's parameter that it reads, where it reads slices alone; None: all of it."""
        parameter = next(
            i for i in fusion.values() if i.opcode == "parameter" and re.match(rf"{number}(?!\d)", i.attributes)
        )
        seen, queue = 0, [parameter.name]
        while queue:
            name = queue.pop()
            for user in fusion.values():
                if name not in user.operands:
                    continue
                first = user.operands[0] == name
                if user.opcode == "bitcast":
                    queue.append(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                    seen += user.shapes[0].bytes
                elif user.opcode == "fusion":
                    inner = self.computations[user.called[0]]
                    used = self._sliced(inner, user.operands.index(name))
                    if used is None:
                        return None
                    seen += used
                elif user.opcode != "dynamic-update-slice" or not first:
                    return None
        return seen


def _updates(fusion: Computation) -> list[Instruction]:
    return [i for i in fusion.values() if i.opcode == "dynamic-update-slice"]


def _dot(instruction: Instruction, computation: Computation) -> float:
    left = computation[instruction.operands[0]].shapes[0].dimensions
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    sizes = [left[int(i)] for i in contracted[1].split(",") if i] if contracted else []
    return 2.0 * math.prod(instruction.shapes[0].dimensions) * math.prod(sizes)


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """TPUs run every matrix product as one; batched ones have windows that mostly meet padding, not counted."""
    left, kernel = (computation[name].shapes[0].dimensions for name in instruction.operands[:2])
    output = instruction.shapes[0].dimensions
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels
    window = dict(
        re.findall(r"(\w+)=([\w\-x]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0])
    )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    spatial = sum(label.isdigit() for label in labels[1])

    def numbers(name: str, otherwise: int) -> list[int]:
        return [int(n) for n in window[name].split("x")] if name in window else [otherwise] * spatial

    pads = [pad.split("_") for pad in window["pad"].split("x")] if "pad" in window else [["0", "0"]] * spatial
    strides, left_holes, right_holes = (numbers("stride", 1), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1))
    products = 2.0 * output[labels[3].index("b")] * output[labels[3].index("f")] * kernel[labels[2].index("i")]
    products /= int(groups[1]) if groups else 1
    for i in range(spatial):
        size, out, taps = (
            shape[label.index(str(i))] for shape, label in ((left, labels[1]), (output, labels[3]), (kernel, labels[2]))
        )
        at = np.arange(out)[:, None] * strides[i] + np.arange(taps) * right_holes[i] - int(pads[i][0])
        products *= int(((at >= 0) & (at < (size - 1) * left_holes[i] + 1) & (at % left_holes[i] == 0)).sum())
    return products


def _attention(kernel: Instruction, computation: Computation, products: int) -> float:
    """Of a splash kernel with a causal mask: blocks past the diagonal are skipped, those on it done whole."""
    shapes = [computation[name].shapes[0].dimensions for name in kernel.operands]
    blocks = shapes[0][-1]  # the first operand says which block of keys each block of queries takes next
    batch, heads, seq, head_dim = next(shape for shape in shapes if len(shape) == 4)
    return products * 2.0 * batch * heads * seq * seq * head_dim * (blocks + 1) / (2 * blocks)
