"""Prepared latents: from tar shards to a training step, broken ones skipped."""

import functools
import io
import itertools
import json
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_wan
import torch_files
from quick_jit import quick_jit

from crcm_jax import ChunkPattern, data, models
from crcm_jax.data import BadRecord, LatentExample
from crcm_jax.training import _data, Alternation, objectives

pytest.importorskip("tensorflow_datasets")

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SHAPE = (3, 4, 4, 4)  # [f, h, w, c] of tiny_wan
TEXT = (3, 6)
NULL = np.full(TEXT, 0.5, np.float32)


def example(i, **changes):
  rng = np.random.default_rng(i)
  embedding = rng.normal(size=TEXT).astype(np.float32)
  embedding[1 + i % 2 :] = 0
  latents = rng.normal(size=SHAPE).astype(np.float32)
  return LatentExample(str(i), latents, embedding, f"é {i}")._replace(**changes)


def members(i, dtype=np.float32, batch=()):
  """The three members of a record, as the original writes them."""
  record = example(i)
  latents = np.moveaxis(record.latents, -1, 0).astype(dtype)
  embedding = record.embedding.astype(dtype)
  return {
    f"{i:06d}.latent.pt": torch_files.torch_bytes(latents[batch]),
    f"{i:06d}.embed.pt": torch_files.torch_bytes(embedding[batch]),
    f"{i:06d}.prompt.txt": record.caption.encode(),
  }


def shard(path, count=4, **settings):
  every = [members(i, **settings) for i in range(count)]
  return torch_files.write_tar(path, functools.reduce(dict.__or__, every))


def read(*paths):
  return list(data.read_latent_shards(paths, channels=4))


def prepare(folder, records, **settings):
  usual = dict(null_embedding=NULL, name="tiny")
  return data.prepare_wan_latents(folder, records=records, **(usual | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A dataset of twelve records in two shards."""
  path = tmp_path_factory.mktemp("wan")
  for name, numbers in (("a", range(7)), ("b", range(7, 12))):
    every = (members(i) for i in numbers)
    torch_files.write_tar(
      path / f"{name}.tar", functools.reduce(dict.__or__, every)
    )
  return prepare(path, read(path / "a.tar", path / "b.tar"))


def batches(folder, **settings):
  return data.wan_latents_batches(folder, **(dict(batch_size=4) | settings))


@pytest.mark.parametrize("batch", [(), np.newaxis])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_shard_holds_what_was_written(tmp_path, dtype, batch):
  records = read(shard(tmp_path / "s.tar", dtype=dtype, batch=batch))
  assert [record.key for record in records] == [f"s/{i:06d}" for i in range(4)]
  for i, record in enumerate(records):
    want = example(i)
    assert record.caption == want.caption
    for name in ("latents", "embedding"):
      stored = getattr(want, name).astype(dtype).astype(np.float32)
      np.testing.assert_array_equal(getattr(record, name), stored)


def test_members_may_lie_apart_and_in_folders(tmp_path):
  every = members(0) | members(1)
  order = sorted(every, key=lambda name: name[::-1])
  path = torch_files.write_tar(
    tmp_path / "s.tar",
    {f"./part/{name}": every[name] for name in order} | {"README": b""},
  )
  assert {r.key for r in read(path)} == {"s/part/000000", "s/part/000001"}


def test_a_record_without_a_member_is_named(tmp_path):
  some = members(0) | members(1)
  del some["000000.embed.pt"], some["000000.prompt.txt"]
  bad, good = read(torch_files.write_tar(tmp_path / "s.tar", some))
  assert bad == BadRecord("s/000000", "has no embed.pt and no prompt.txt")
  assert isinstance(good, LatentExample)


@pytest.mark.parametrize(
  ("part", "raw", "reason"),
  [
    ("latent.pt", b"<html>", "cannot be read.*000000.latent.pt is not"),
    ("latent.pt", members(0)["000000.latent.pt"][:300], "cannot be read"),
    ("embed.pt", b"", "cannot be read.*000000.embed.pt"),
    ("prompt.txt", b"\xff\xff", "cannot be read.*utf-8"),
    (
      "embed.pt",
      torch_files.repeated_torch_bytes((10**6, 10**6)),
      r"must hold the numbers of \(1000000, 1000000\)",
    ),
    (
      "latent.pt",
      torch_files.torch_bytes(np.zeros((3, 4, 4, 4, 4), np.float32)),
      r"must have 4 axes; it has \(3, 4, 4, 4, 4\)",
    ),
    (
      "latent.pt",
      torch_files.torch_bytes(np.zeros((3, 4, 4, 4), np.float32)),
      r"c = 4; it has \(3, 4, 4, 4\)",
    ),
  ],
)
def test_a_broken_member_is_named(tmp_path, part, raw, reason):
  some = members(0) | {f"000000.{part}": raw}
  (bad,) = read(torch_files.write_tar(tmp_path / "s.tar", some))
  assert bad.key == "s/000000"
  assert re.search(reason, bad.reason), bad


def test_code_in_a_member_is_refused(tmp_path):
  with np.load(GOLDEN / "wan_torch_file.npz") as file:
    raw = file["file_with_code"].tobytes()
  some = members(0) | {"000000.latent.pt": raw}
  (bad,) = read(torch_files.write_tar(tmp_path / "s.tar", some))
  assert "could run any code and is refused" in bad.reason


def test_a_shard_that_is_cut_off_gives_what_is_whole(tmp_path):
  path = shard(tmp_path / "s.tar")
  raw = path.read_bytes()
  path.write_bytes(raw[: len(raw) // 2])
  records = read(path)
  good = [r for r in records if isinstance(r, LatentExample)]
  assert 1 <= len(good) < 4
  assert records[-1].key == "s.tar"
  assert "is cut off" in records[-1].reason
  path.write_bytes(b"<html>not a tar</html>" * 100)
  (bad,) = read(path)
  assert "is no tar file" in bad.reason
  with pytest.raises(FileNotFoundError):
    read(tmp_path / "none.tar")


def test_a_batch_holds_what_was_prepared(folder):
  info = data.describe_wan_latents(folder)
  assert info == (12, SHAPE, TEXT, {})
  batch = next(batches(folder, batch_size=12, shuffle=False))
  assert {a.dtype for a in batch} == {np.dtype(np.float32)}
  want = [example(i) for i in range(12)]
  first = lambda latents: float(latents[0, 0, 0, 0])
  order = np.argsort([first(latents) for latents in batch.x_0])
  want = sorted(want, key=lambda record: first(record.latents))
  for name, got in (("latents", batch.x_0), ("embedding", batch.condition)):
    stored = [getattr(record, name).astype(np.float16) for record in want]
    np.testing.assert_array_equal(got[order], stored)
  np.testing.assert_array_equal(batch.null_condition, [NULL] * 12)
  assert next(batches(folder, frames=2)).x_0.shape == (4, 2, 4, 4, 4)


def test_processes_share_and_positions_resume(folder):
  take = lambda iterator, n: [next(iterator).x_0 for _ in range(n)]
  keys = lambda arrays: {clip.tobytes() for a in arrays for clip in a}
  shares = [
    keys(take(batches(folder, rows=rows), 3)) for rows in ((0, 1), (2, 3))
  ]
  assert len(shares[0] | shares[1]) == 12
  iterator = batches(folder)
  take(iterator, 2)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 3)
  iterator = batches(folder)
  iterator.set_state(state)
  np.testing.assert_array_equal(take(iterator, 3), expected)


BAD = [
  BadRecord("b0", "is cut off"),
  example(21, latents=np.full(SHAPE, np.nan, np.float32)),
  example(22, latents=np.full(SHAPE, 1e6, np.float32)),
  example(23, latents=np.zeros((2, 4, 4, 4), np.float32)),
  example(24, embedding=np.zeros((3, 5), np.float32)),
  example(1),
]


def test_bad_records_are_named_counted_and_skipped(tmp_path, caplog):
  good = [example(i) for i in range(2)]
  with caplog.at_level(logging.WARNING, "crcm_jax"):
    folder = prepare(tmp_path, [BAD[0], *good, *BAD[1:]], max_bad=6)
  info = data.describe_wan_latents(folder)
  assert info.examples == 2
  reasons = dict(zip(("b0", "21", "22", "23", "24", "1"), (
    "is cut off", "latents that are not finite", "not finite in float16",
    r"must have latents of shape (3, 4, 4, 4); it has (2, 4, 4, 4)",
    "must have embedding of shape (3, 6); it has (3, 5)",
    "has the name of an earlier one"), strict=True))  # fmt: skip
  assert info.skipped.keys() == reasons.keys()
  for key, reason in reasons.items():
    assert reason in info.skipped[key]
    assert f"Skipped: {key} " in caplog.text


def test_too_many_bad_records_leave_nothing_behind(tmp_path):
  with pytest.raises(ValueError, match=r"is 5, and there are.* 6: b0 is cut o"):
    prepare(tmp_path, [example(0), example(1), *BAD], max_bad=5)
  assert not list(tmp_path.rglob("*array_record*"))
  prepare(tmp_path, [example(0)])  # the name is still free


def test_bad_arguments_say_what_is_wrong(tmp_path, folder):
  with pytest.raises(ValueError, match="whole ones; got none"):
    prepare(tmp_path, [])
  with pytest.raises(ValueError, match="the first 1 are bad: b0 is cut off"):
    prepare(tmp_path, BAD[:1])
  endless = (BadRecord(str(i), "is bad") for i in itertools.count())
  with pytest.raises(ValueError, match="the first 3 are bad"):
    prepare(tmp_path, endless, max_bad=2)
  with pytest.raises(ValueError, match=r"`name` must consist.*'a/b'"):
    prepare(tmp_path, [example(0)], name="a/b")
  with pytest.raises(ValueError, match="`dtype` must be float16 or"):
    prepare(tmp_path, [example(0)], dtype="int8")
  with pytest.raises(ValueError, match=r"`null_embedding`.*\(3, 6\); got \(2"):
    prepare(tmp_path, [example(0)], null_embedding=NULL[:2])
  with pytest.raises(FileExistsError, match="`name` must be new"):
    prepare(folder.parents[2], [example(0)])
  with pytest.raises(ValueError, match=r"`frames` must lie in \[1, 3\].*got 4"):
    batches(folder, frames=4)
  with pytest.raises(FileNotFoundError, match="must be a prepared dataset"):
    batches(tmp_path)


def test_a_step_of_teacher_forcing(folder):
  dataset = _data.WanLatents(folder=str(folder), batch_size=2, frames=3)
  batch = next(dataset.batches(folder.parent, seed=0))
  assert jax.tree.map(jnp.shape, batch) == jax.tree.map(
    lambda a: a.shape, dataset.shapes()
  )
  objective = objectives.TeacherForcing(
    student=models.Wan(tiny_wan.CONFIG), pattern=ChunkPattern(1, 1)
  )
  counters = Alternation().counters(0)

  def loss(params, batch, key):
    draws = objective.draws(key, batch, counters)
    return objective.loss(params, {}, batch, draws, counters)[0].sum()

  grad = quick_jit(jax.grad(loss))
  grads = grad(tiny_wan.params(), batch, jax.random.key(0))
  norms = [float(jnp.linalg.norm(g.ravel())) for g in jax.tree.leaves(grads)]
  assert np.isfinite(norms).all()
  assert np.count_nonzero(norms) == len(norms)


def test_what_a_dataset_of_latents_cannot_do(folder):
  dataset = _data.WanLatents(folder=str(folder), batch_size=2)
  with pytest.raises(ValueError, match="held-out"):
    next(dataset.clips(folder, 2))
  assert dataset.shapes().x_0.shape == (2, *SHAPE)


def test_bytes_in_memory_are_read_like_a_file(tmp_path):
  from crcm_jax.models._torch_file import open_torch

  raw = torch_files.torch_bytes(np.arange(6, dtype=np.float32).reshape(2, 3))
  (tmp_path / "a.pt").write_bytes(raw)
  for tensors in (
    open_torch(tmp_path / "a.pt"), open_torch("a.pt", io.BytesIO(raw))
  ):  # fmt: skip
    np.testing.assert_array_equal(tensors[""].read(), [[0, 1, 2], [3, 4, 5]])
