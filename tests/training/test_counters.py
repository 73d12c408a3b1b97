"""Alternation and step counts against the reference's tables."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import GOLDEN

from crcm_jax.testing import golden
from crcm_jax.training import Alternation, step_counts

MISC = golden.load(GOLDEN / "misc.npz")
TABLES = sorted(
  name for name in MISC.arrays if re.fullmatch(r"alternation_.*fake\d", name)
)
FULL = {"42": [4, 2, 2, 2, 2], "41": [4, 1, 1, 1, 1]}


def _order(name):
  warmup, every, critic = map(
    int, re.search(r"warm(\d+)_freq(\d+)_fake(\d)", name).groups()
  )
  return Alternation(student_every=every if critic else 1, warmup=warmup)


@pytest.mark.parametrize("name", TABLES)
def test_alternation(name):
  order, table = _order(name), MISC[name]
  iterations = np.arange(len(table))
  phases = [order.is_student(i) for i in iterations.tolist()]
  counters = jax.vmap(order.counters)(jnp.asarray(iterations, jnp.int32))
  columns = [phases, counters.student]
  columns += [counters.critic] if "fake1" in name else []
  table = table[:, : len(columns)]
  parity.check("misc", name, np.stack(columns, 1), table)
  assert all(c.dtype == jnp.int32 for c in counters)


@pytest.mark.parametrize("who", ["student", "critic"])
@pytest.mark.parametrize("full", FULL)
def test_step_counts_cycle_through_each_chunks_schedule(full, who):
  suffix = f"_simsteps_sched{full}_{who}"
  tables = [name for name in MISC.arrays if name.endswith(suffix)]
  assert tables
  for name in tables:
    order, table = _order(name), MISC[name]
    iterations = jnp.arange(len(table), dtype=jnp.int32)
    counters = jax.vmap(order.counters)(iterations)
    counts = jax.vmap(step_counts, (0, None))(
      getattr(counters, who), jnp.array(FULL[full])
    )
    parity.check("misc", name, counts, table)


def test_one_schedule_for_all_chunks_is_the_global_cycle():
  for name in MISC.arrays:
    if not name.endswith("_simsteps"):
      continue
    table = MISC[name]
    counters = jax.vmap(_order(name).counters)(jnp.arange(len(table)))
    for column, counter in enumerate((counters.student, counters.critic)):
      counts = jax.vmap(step_counts, (0, None))(counter, jnp.full(3, 4))
      want = np.repeat(table[:, column, None], 3, 1)
      parity.check("misc", name, counts, want)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"student_every": 0}, "`student_every` must be at least 1.*got 0"),
    ({"warmup": -1}, "`warmup` must not be negative; got -1"),
  ],
)
def test_orders_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Alternation(**settings)
