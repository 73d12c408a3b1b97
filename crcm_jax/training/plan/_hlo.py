"""What a compiled program moves: through its memory, and between devices.

The program's text has a computation a paragraph. The body of a loop counts as
often as it runs, where its trip count can be read: from the compiler's note,
or off its condition, `counter < constant`.

Each instruction reads its operands and writes its results once; what stays in
a TPU's vector memory, `S(1)` in a layout, costs nothing, and a slice or an
update of a slice costs the slice. Kernels that read an array several times
count it once, so that the sum is the least that the program moves.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
"""The collectives."""

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"(?:ENTRY )?{_NAME} \(.*\{{")
_INSTRUCTION = re.compile(
  rf"\s+(ROOT )?{_NAME} = (.*?) ([a-z][a-z\d\-]*)\((.*)"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
  r"(calls|body|condition|to_apply|\w+_computations?)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "iota", "opt-barrier"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


class Moved(NamedTuple):
  """How often something moves, and how many bytes in all."""

  count: float = 0.0
  bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device moves.

  Attributes:
    memory: bytes from and to its memory.
    collectives: for each kind, its number and the bytes of its larger side.
  """

  memory: float = 0.0
  collectives: dict[str, Moved] = dataclasses.field(default_factory=dict)

  @property
  def sent(self) -> float:
    """Bytes over the interconnect; an all-reduce sends everything twice."""
    each = (
      (2 if kind == "all-reduce" else 1) * moved.bytes
      for kind, moved in self.collectives.items()
    )
    return sum(each, 0.0)

  def times(self, n: float) -> "Traffic":
    """Returns the traffic of n runs."""
    return Traffic(
      n * self.memory,
      {k: Moved(n * m.count, n * m.bytes) for k, m in self.collectives.items()},
    )


def traffic(text: str, trips: float = 1.0) -> Traffic:
  """Returns what a program moves.

  Args:
    text: of a compiled program, `compiled.as_text()`.
    trips: iterations of a loop whose number cannot be read.
  """
  return _Program(text, trips).traffic


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  root: bool
  type: str
  opcode: str
  rest: str

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

  @functools.cached_property
  def called(self) -> dict[str, list[str]]:
    return {
      key: re.findall(r"[\w.\-]+", names)
      for key, names in _CALLED.findall(self.rest)
    }


class _Program:
  """A parsed program."""

  def __init__(self, text: str, trips: float):
    self._trips = trips
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._done: dict[str, Traffic] = {}
    entry, current = "", {}
    for line in text.splitlines():
      if head := _COMPUTATION.match(line):
        current = self._computations.setdefault(head[1], {})
        entry = head[1] if line.startswith("ENTRY") else entry
      elif found := _INSTRUCTION.match(line):
        root, name, kind, opcode, rest = found.groups()
        current[name] = _Instruction(name, bool(root), kind, opcode, rest)
    self.traffic = self._of(entry)

  def _of(self, name: str) -> Traffic:
    if name not in self._done:
      where = self._computations.get(name, {})
      parts = [self._of_instruction(i, where) for i in where.values()]
      self._done[name] = _sum(parts)
    return self._done[name]

  def _of_instruction(
    self, at: _Instruction, where: dict[str, _Instruction]
  ) -> Traffic:
    called = [self._of(n) for names in at.called.values() for n in names]
    kind = at.opcode.removesuffix("-start")
    if at.opcode in _FREE or at.opcode.endswith("-done"):
      return Traffic()
    if at.opcode == "while":
      (body,), (condition,) = at.called["body"], at.called["condition"]
      return self._of(body).times(self._trip_count(at, condition))
    if at.opcode == "conditional":
      return max(called, key=lambda part: part.memory + part.sent)
    if kind in KINDS:
      moved = Moved(1.0, _collective_bytes(at, where))
      return Traffic(self._bytes(at, where), {kind: moved})
    if at.opcode in ("call", "async-start"):
      return _sum(called)
    inner = _sum(called).collectives if at.opcode == "fusion" else {}
    return Traffic(self._bytes(at, where), inner)

  def _trip_count(self, at: _Instruction, condition: str) -> float:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', at.rest):
      return float(known[1])
    where = self._computations.get(condition, {})
    (root,) = (i for i in where.values() if i.root)
    if "direction=LT" in root.rest:
      for name in root.operands[1:]:
        stop = re.match(r"(\d+)\)", where[name].rest)
        if where[name].opcode == "constant" and stop:
          return float(stop[1])
    return self._trips

  def _bytes(self, at: _Instruction, where: dict[str, _Instruction]) -> float:
    """Bytes from and to memory of one instruction."""
    operands = [where[name] for name in at.operands if name in where]
    if at.opcode == "fusion":
      return self._fusion_bytes(at, operands)
    if at.opcode in _SLICES:
      return 2 * _size(at.type)
    if at.opcode == "dynamic-update-slice":
      return 2 * _size(operands[1].type)
    if at.opcode.endswith("-start"):  # (target, source, ...)
      target = next(_ARRAY.finditer(at.type))[0]
      return _size(target) + sum(_size(x.type) for x in operands)
    return _size(at.type) + sum(_size(x.type) for x in operands)

  def _fusion_bytes(
    self, at: _Instruction, operands: list[_Instruction]
  ) -> float:
    inside = self._computations.get(at.called.get("calls", [""])[0], {})
    total = 0.0
    for name, i in inside.items():
      if i.opcode == "parameter":
        operand = operands[int(i.rest.split(")")[0])]
        total += _read(name, _size(operand.type), inside)
    (root,) = (i for i in inside.values() if i.root)
    results = root.operands if root.opcode == "tuple" else [root.name]
    types = _ARRAY.finditer(at.type)
    for name, kind in zip(results, types, strict=False):
      result = inside[name]
      if result.opcode == "dynamic-update-slice":
        total += _size(inside[result.operands[1]].type)
      else:
        total += _size(kind[0])
    return total


def _read(name: str, size: float, inside: dict[str, _Instruction]) -> float:
  """Bytes that a fusion reads of a parameter."""
  users = [i for i in inside.values() if name in i.operands]
  first = [i for i in users if i.operands[0] == name]
  if users and len(first) == len(users):
    if all(i.opcode in _SLICES for i in users):
      return min(size, sum(_size(i.type) for i in users))
    if all(i.opcode == "dynamic-update-slice" for i in users):
      return 0.0
  return size


def _collective_bytes(
  at: _Instruction, where: dict[str, _Instruction]
) -> float:
  """Bytes of the larger side; a "-start" has both sides in its type."""
  given = sum(
    _size(where[n].type, anywhere=True) for n in at.operands if n in where
  )
  made = _size(at.type, anywhere=True)
  if at.opcode.endswith("-start") and at.opcode != "all-reduce-start":
    made -= given
  return max(given, made)


def _size(types: str, anywhere: bool = False) -> float:
  """Bytes of arrays in memory, or `anywhere`."""
  total = 0.0
  for dtype, shape, layout in _ARRAY.findall(types):
    if anywhere or "S(1)" not in layout:
      count = 1
      for n in filter(None, shape.split(",")):
        count *= int(n)
      total += count * _width(dtype)
  return total


def _width(dtype: str) -> float:
  """Bytes of an element."""
  if dtype in ("pred", "token"):
    return float(dtype == "pred")
  bits = re.search(r"\d+", dtype)
  return int(bits[0]) / 8 if bits else 0.0


def _sum(parts: Iterable[Traffic]) -> Traffic:
  memory, collectives = 0.0, {}
  for part in parts:
    memory += part.memory
    for kind, moved in part.collectives.items():
      old = collectives.get(kind, Moved())
      collectives[kind] = Moved(*map(sum, zip(old, moved, strict=True)))
  return Traffic(memory, collectives)
