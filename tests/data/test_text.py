import itertools

import numpy as np
import pytest

from crcm_jax import data

EXAMPLE = "seven moving left and up, fast; two moving down"


def single_clauses():
  directions = itertools.product(("", "left", "right"), ("", "up", "down"))
  return [
    data.Clause(digit, *direction, speed)
    for digit in data.DIGIT_WORDS
    for direction in directions
    if any(direction)
    for speed in ("slowly", "", "fast")
  ]


def test_captions_are_read_as_they_are_written():
  clauses = single_clauses()
  for pair in zip(clauses, reversed(clauses), strict=True):
    assert data.read_caption(data.write_caption(pair)) == pair
  assert data.read_caption(EXAMPLE.upper()) == data.read_caption(EXAMPLE)
  assert data.read_caption(data.NULL_CAPTION) == ()


def test_embeddings_are_fixed_and_of_unit_variance():
  first, second = (data.encode_captions([EXAMPLE]) for _ in range(2))
  np.testing.assert_array_equal(first, second)
  assert first.shape == (1, data.TEXT_LENGTH, data.TEXT_WIDTH)
  assert first.dtype == np.float32
  np.testing.assert_allclose((first**2).mean(-1), 1, rtol=1e-6)


def test_version_1_of_the_encoder():
  # H[i, j] = (-1)^popcount(i & j). Token 0 says "seven", symbol 9, in the
  # first clause, row 30.
  sign = lambda i, j: (-1) ** (i & j).bit_count()
  expected = [(sign(9, j) + sign(30, j)) / np.sqrt(2) for j in range(32)]
  assert data.TEXT_ENCODER_VERSION == 1
  token = data.encode_captions([EXAMPLE])[0, 0]
  np.testing.assert_allclose(token, expected, atol=1e-6)


def test_different_captions_have_different_embeddings():
  singles = [data.write_caption([clause]) for clause in single_clauses()]
  pairs = [f"{a}; {b}" for a, b in zip(singles, singles[7:], strict=False)]
  captions = [data.NULL_CAPTION, *singles, *pairs]
  embeddings = data.encode_captions(captions).reshape(len(captions), -1)
  assert len(np.unique(embeddings, axis=0)) == len(captions)


def test_null_caption_shares_no_token_with_any_other():
  null, example, short = data.encode_captions(["", EXAMPLE, "one moving up"])
  for other in (example, short):
    assert not (null == other).all(-1).any()


def test_one_word_changes_one_token():
  a, b = data.encode_captions([EXAMPLE, EXAMPLE.replace("down", "up")])
  assert (a != b).any(-1).tolist() == [False] * 6 + [True, False]


@pytest.mark.parametrize(
  ("caption", "message"),
  [
    ("sevn moving left", r"got 'sevn' in .*mean 'seven'"),
    ("seven moving sideways", r"got 'sideways'"),
    ("seven moving upp; xyzzy", r"mean 'up'"),
    ("xyzzy", r"mean zero, one,"),
    ("one; two; three", r"at most 2 clauses.* got 3"),
    ("moving left", r"must name a digit.* got 'moving left'"),
    ("seven moving left; ", r"must name a digit.* got ''"),
    ("two left and right", r"one horizontal .* got 'left' and 'right'"),
  ],
)  # fmt: skip
def test_unreadable_captions_say_what_is_wrong(caption, message):
  with pytest.raises(ValueError, match=message):
    data.encode_captions([caption])
