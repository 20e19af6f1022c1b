# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A compiled program's text as computations, and how often each of its instructions runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LONGEST = 100_000  # turns of a loop that are counted one by one
_SAME = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier")
_COMPARISONS = {
    "LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__,
    "EQ": int.__eq__, "NE": int.__ne__,
}  # fmt: skip


class Instruction(NamedTuple):
    """One line: `shape` and `attributes` as they are written, operands by name."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses
    attributes: str

    @property
    def called(self) -> list[str]:
        """Return the computations of a call, a fusion or a reduction."""
        return _CALLED.findall(self.attributes)

    @property
    def op_name(self) -> str:
        """Return where JAX made it, such as jit(step)/while/body/dot_general, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Return the value of `name=value`, "" where there is none."""
        found = re.search(rf"\b{name}=%?([^,\s]+)", self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A named list of instructions, such as the body of a loop."""

    instructions: dict[str, Instruction]  # by name
    root: str


class Module(NamedTuple):
    """All computations of a program."""

    computations: dict[str, Computation]  # by name
    entry: str


class Loop(NamedTuple):
    """A loop, and how often its body runs."""

    instruction: Instruction
    turns: int | None  # None: the text does not tell, it counts once


class Run(NamedTuple):
    """An instruction, and the loops that it runs in, outermost first."""

    instruction: Instruction
    loops: tuple[Loop, ...]

    @property
    def times(self) -> int:
        """Return how often one step runs it."""
        return math.prod(1 if loop.turns is None else loop.turns for loop in self.loops)


def parse(text: str) -> Module:
    """Return the computations of `compiled.as_text()`."""
    computations, entry = {}, ""
    name, instructions, root = "", {}, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, instructions, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(instructions, root)
        elif found := _INSTRUCTION.match(line):
            one = _instruction(found[2], line[found.end() :])
            instructions[one.name] = one
            root = one.name if found[1] else root
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    """Read `shape opcode(operands), attributes`; shapes may hold parentheses of their own."""
    end = _closing(rest, 0) if rest.startswith("(") else 0
    start = rest.index(" ", end) + 1
    paren = rest.index("(", start)
    close = _closing(rest, paren)
    inside = re.sub(r"/\*.*?\*/", "", rest[paren + 1 : close])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        name, rest[: start - 1], rest[start:paren], operands, inside, rest[close + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Return the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def runs(module: Module) -> Iterator[Run]:
    """Yield what the entry runs, loops and calls opened, fusions whole.

    A conditional yields its longest branch: the one with most instructions.
    """
    yield from _runs(module, module.entry, ())


def _runs(module: Module, name: str, loops: tuple[Loop, ...]) -> Iterator[Run]:
    computation = module.computations[name]
    for one in computation.instructions.values():
        yield Run(one, loops)
        if one.opcode == "while":
            loop = Loop(one, trip_count(module, computation, one))
            yield from _runs(module, one.attribute("body"), (*loops, loop))
        elif one.opcode in ("call", "call-start", "async-start"):
            for called in one.called:
                yield from _runs(module, called, loops)
        elif one.opcode == "conditional":
            found = [a or b for a, b in _BRANCHES.findall(one.attributes)]
            names = [n.strip().lstrip("%") for branch in found for n in branch.split(",")]
            yield from max((list(_runs(module, n, loops)) for n in names), key=len)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Return how often a `while` turns, None where its text does not tell.

    XLA notes it for some loops. For others the counter is followed: from the first value, as the
    body changes it, while the condition holds.
    """
    if found := _TRIPS.search(loop.attributes):
        return int(found[1])
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    first = computation.instructions[loop.operands[0]]
    if first.opcode != "tuple":
        return None
    used = _counters(condition)
    results = body.instructions[body.root].operands
    if not used or body.instructions[body.root].opcode != "tuple":
        return None
    state = {
        index: _value(module, computation, name, {})
        for index, name in enumerate(first.operands)
        if index in used or _passes(body, results[index], index)
    }
    for turns in range(_LONGEST):
        held = _value(module, condition, condition.root, {0: state})
        if not held:
            return turns if held is not None else None
        new = {i: _value(module, body, results[i], {0: state}) for i in used}
        state |= new
    return None


def _counters(condition: Computation) -> list[int]:
    """Return the indices of the loop's state that the condition reads."""
    reads = condition.instructions.values()
    return [int(one.attribute("index")) for one in reads if one.opcode == "get-tuple-element"]


def _passes(body: Computation, name: str, index: int) -> bool:
    """Return whether this result of a loop's body is what came in at `index`."""
    one = body.instructions[name]
    while one.opcode in _SAME:
        one = body.instructions[one.operands[0]]
    return one.opcode == "get-tuple-element" and one.attribute("index") == str(index)


def _value(module: Module, computation: Computation, name: str, parameters: dict):
    """Return an integer scalar's value, None where it depends on more than integers here.

    Args:
        parameters: of the computation, by number; a tuple as a dict by index.
    """
    one = computation.instructions[name]
    follow = lambda operand: _value(module, computation, operand, parameters)
    if one.opcode == "constant":
        text = {"true": "1", "false": "0"}.get(one.literal, one.literal)
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if one.opcode == "parameter":
        return parameters.get(int(one.literal))
    if one.opcode == "get-tuple-element":
        state = follow(one.operands[0])
        return state.get(int(one.attribute("index"))) if isinstance(state, dict) else None
    if one.opcode in _SAME:
        return follow(one.operands[0])
    if one.opcode in ("fusion", "call"):
        called = module.computations[one.called[0]]
        inner = dict(enumerate(map(follow, one.operands)))
        return _value(module, called, called.root, inner)
    if one.opcode not in ("add", "subtract", "compare"):
        return None
    left, right = map(follow, one.operands)
    if not isinstance(left, int) or not isinstance(right, int):
        return None
    if one.opcode == "compare":
        return int(_COMPARISONS[one.attribute("direction")](left, right))
    return left + right if one.opcode == "add" else left - right
