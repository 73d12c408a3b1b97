"""Captions of moving digits, and their fixed embedding.

A caption has one clause for each digit, joined by "; ":

  DIGIT moving DIRECTION[, SPEED]

DIGIT is "zero" to "nine"; DIRECTION is "left" or "right", "up" or "down", or
one of each joined by "and"; SPEED is "slowly" or "fast", and unsaid between.

A clause fills four roles: digit, horizontal, vertical, speed. The embedding has
one token for each role of each of two clauses, l = 8, of width d = 32:

  embedding[4 k + r] = (H[symbol of role r in clause k] + H[30 + k]) / sqrt(2)

H is the 32 x 32 Sylvester-Hadamard matrix, whose rows of +1 and -1 are
orthogonal: all symbols are equally far apart, entries have unit variance, and
nothing is downloaded or drawn at random. A role that is unsaid has a symbol of
its own. The null caption, "", has one symbol that no other caption uses.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crcm_jax._typing import Float

TEXT_ENCODER_VERSION = 1
"""Rises whenever the embedding of some caption changes."""

TEXT_LENGTH = 8
"""Tokens in an embedding: four roles in each of two clauses."""

TEXT_WIDTH = 32
"""Width of each token."""

NULL_CAPTION = ""
"""The caption that says nothing: the unconditional branch of guidance."""

DIGIT_WORDS = (
  "zero", "one", "two", "three", "four",
  "five", "six", "seven", "eight", "nine",
)  # fmt: skip
HORIZONTAL_WORDS = ("left", "right")
VERTICAL_WORDS = ("up", "down")
SPEED_WORDS = ("slowly", "fast")

_ROLES = {
  "digit": DIGIT_WORDS,
  "horizontal": HORIZONTAL_WORDS,
  "vertical": VERTICAL_WORDS,
  "speed": SPEED_WORDS,
}
_FUNCTION_WORDS = ("moving", "and")
_VOCABULARY = (*itertools.chain(*_ROLES.values()), *_FUNCTION_WORDS)
_MAX_CLAUSES = TEXT_LENGTH // len(_ROLES)

# The symbol table: the null symbol, then each role's unsaid symbol and words.
# New words go at the end; rows 30 and 31 of H tell the clauses apart.
_NULL_SYMBOL = 0
_SYMBOLS = {
  symbol: 1 + i
  for i, symbol in enumerate(
    (role, word) for role, words in _ROLES.items() for word in ("", *words)
  )
}
_CLAUSE_ROW = TEXT_WIDTH - _MAX_CLAUSES
assert len(_SYMBOLS) < _CLAUSE_ROW


class Clause(NamedTuple):
  """What a caption says of one digit; "" where it says nothing."""

  digit: str
  horizontal: str = ""
  vertical: str = ""
  speed: str = ""


def write_caption(clauses: Sequence[Clause]) -> str:
  """Writes the caption that says `clauses`.

  Args:
    clauses: one for each digit; each moves in at least one direction.

  Returns:
    The caption; `read_caption` inverts it.

  Example:
    >>> seven = Clause("seven", "left", "up", "fast")
    >>> write_caption([seven, Clause("two", vertical="down")])
    'seven moving left and up, fast; two moving down'
  """
  return "; ".join(map(_write_clause, clauses))


def _write_clause(clause: Clause) -> str:
  direction = " and ".join(filter(None, (clause.horizontal, clause.vertical)))
  speed = clause.speed and f", {clause.speed}"
  return f"{clause.digit} moving {direction}{speed}"


def read_caption(caption: str) -> tuple[Clause, ...]:
  """Reads what a caption says.

  Args:
    caption: clauses separated by ";". Case and commas do not matter. The null
      caption has no clauses.

  Returns:
    One `Clause` for each digit, in the caption's order.

  Raises:
    ValueError: if a word is unknown (the message names the nearest known
      ones), a clause names no digit or fills one role twice, or there are more
      than two clauses.
  """
  if not caption.strip():
    return ()
  clauses = caption.split(";")
  if len(clauses) > _MAX_CLAUSES:
    raise ValueError(
      f"`caption` must have at most {_MAX_CLAUSES} clauses separated by ';';"
      f" got {len(clauses)} in {caption!r}. Describe at most {_MAX_CLAUSES}"
      " digits."
    )
  return tuple(_read_clause(clause, caption) for clause in clauses)


def _read_clause(clause: str, caption: str) -> Clause:
  roles = {}
  for word in re.findall(r"[^\s,.]+", clause.lower()):
    role = _role_of(word, caption)
    if role in roles:
      raise ValueError(
        f"`caption` must name one {role} in each clause; got {roles[role]!r}"
        f" and {word!r} in {caption!r}. Separate digits with ';'."
      )
    if role is not None:
      roles[role] = word
  if "digit" not in roles:
    raise ValueError(
      f"`caption` must name a digit, zero to nine, in each clause; got"
      f" {clause.strip()!r} in {caption!r}. Write 'seven moving left'."
    )
  return Clause(**roles)


def _role_of(word: str, caption: str) -> str | None:
  """Returns the role that a word fills; `None` for "moving" and "and"."""
  if word in _FUNCTION_WORDS:
    return None
  for role, words in _ROLES.items():
    if word in words:
      return role
  near = difflib.get_close_matches(word, _VOCABULARY, n=3, cutoff=0.5)
  cure = " or ".join(map(repr, near)) or ", ".join(_VOCABULARY)
  raise ValueError(
    f"`caption` must use known words; got {word!r} in {caption!r}. Did you"
    f" mean {cure}?"
  )


def encode_captions(captions: Sequence[str]) -> Float[np.ndarray, "b l d"]:
  """Embeds captions, as the module's equation says.

  Args:
    captions: of the grammar above; "" is the null caption.

  Returns:
    float32 embeddings of `TEXT_LENGTH` tokens of width `TEXT_WIDTH`, entries
    of unit variance.

  Raises:
    ValueError: if a caption cannot be read; see `read_caption`.
  """
  return np.stack([_encode_caption(caption) for caption in captions])


@functools.lru_cache(maxsize=1024)
def _encode_caption(caption: str) -> Float[np.ndarray, "l d"]:
  h = _hadamard()
  symbols = np.array(_symbols(read_caption(caption)))
  clause = np.arange(TEXT_LENGTH) // len(_ROLES)
  return (h[symbols] + h[_CLAUSE_ROW + clause]) / np.float32(np.sqrt(2))


def _symbols(clauses: tuple[Clause, ...]) -> list[int]:
  """Returns the symbol of every token."""
  if not clauses:
    return [_NULL_SYMBOL] * TEXT_LENGTH
  absent = (Clause(""),) * (_MAX_CLAUSES - len(clauses))
  return [
    _SYMBOLS[role, word]
    for clause in (*clauses, *absent)
    for role, word in clause._asdict().items()
  ]


@functools.cache
def _hadamard() -> Float[np.ndarray, "d d"]:
  """Returns Sylvester's matrix: H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]."""
  h = np.ones((1, 1), np.float32)
  while len(h) < TEXT_WIDTH:
    h = np.block([[h, h], [h, -h]])
  return h
