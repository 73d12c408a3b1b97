"""Operations counted in a jaxpr: against hand counts and against XLA's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_wan
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from crcm_jax import ChunkPattern, kernels, models, training
from crcm_jax.training import flops

A = jnp.ones((3, 4))
SQUARE = jnp.ones((4, 4))
ONE = 2 * 3 * 4 * 4  # A @ SQUARE


def product(a):
  return a @ SQUARE


def xla(function, *args):
  """What XLA counts, right where there is no loop and no element-wise work."""
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  "function",
  [
    product,
    lambda a: jnp.einsum("bij,bkj->bik", a[None], a[None]),
    lambda a: jax.vjp(lambda a: a.T @ a @ SQUARE, a)[1](SQUARE)[0],
  ],
)
def test_products_are_what_xla_counts(function):
  additions = A.size  # of a gradient's two parts, which are not counted
  assert 0 <= xla(function, A) - flops.count(function, A).total <= additions


@pytest.mark.parametrize(
  "settings",
  [
    dict(window_strides=(1, 2), padding="SAME"),
    dict(window_strides=(2, 1), padding="VALID", rhs_dilation=(1, 2)),
    dict(window_strides=(1, 1), padding=((1, 1), (2, 0)), lhs_dilation=(2, 3)),
    dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
  ],
)
def test_convolutions_are_what_xla_counts(settings):
  groups = settings.get("feature_group_count", 1)
  x, w = jnp.ones((2, 4, 9, 8)), jnp.ones((6, 4 // groups, 3, 2))
  run = functools.partial(lax.conv_general_dilated, **settings)
  assert flops.count(run, x, w) == (xla(run, x, w), 0)


def custom(a):
  call = jax.custom_vjp(product)
  call.defvjp(lambda a: (product(a), None), lambda _, g: (product(g),))
  return call(a)


def custom_forward(a):
  call = jax.custom_jvp(product)
  call.defjvp(lambda x, t: (product(*x), product(*t)))
  return call(a)


LOOPS = {
  "scan": (lambda a: lax.scan(lambda a, _: (product(a), None), a, length=5), 5),
  "nested": (
    lambda a: lax.fori_loop(
      0, 3, lambda _, a: lax.fori_loop(0, 2, lambda _, a: product(a), a), a
    ),
    6,
  ),
  "while": (
    lambda a: lax.while_loop(
      lambda c: c[0] < 7, lambda c: (c[0] + 2, product(c[1])), (1, a)
    ),
    3,
  ),
  "unknown": (
    lambda a: lax.while_loop(lambda a: a[0, 0] < 9, product, a),
    2.5,
  ),
  "cond": (
    lambda a: lax.cond(
      a[0, 0] > 0, lambda a: product(product(a)), lambda a: product(a), a
    ),
    2,
  ),
  "jit": (jax.jit(product), 1),
  "custom vjp": (custom, 1),
  "custom jvp": (custom_forward, 1),
  "jvp of it": (lambda a: jax.jvp(custom_forward, (a,), (a,)), 2),
  "vjp of it": (lambda a: jax.vjp(custom, a)[1](a), 1),
  "remat": (
    jax.value_and_grad(
      lambda a: jnp.sum(jax.checkpoint(lambda a: product(jnp.sin(a)) ** 2)(a))
    ),
    3,
  ),
  "dead": (lambda a: (product(a), a)[1], 0),
  "devices": (
    jax.shard_map(
      product,
      mesh=AbstractMesh((3, 2), ("x", "y")),
      in_specs=PartitionSpec("x"),
      out_specs=PartitionSpec("x"),
      axis_names={"x"},
    ),
    1,
  ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_body_counts_as_often_as_it_runs(name):
  function, times = LOOPS[name]
  given = flops.RunTime(trips=2.5)
  assert flops.count(function, A, run_time=given) == (times * ONE, 0)


B, S, N, D = 2, 6, 3, 4
Q = jnp.ones((B, S, N, D))
BOUNDARIES = (0, 2, 6)
NOISY = kernels.BlockMask.noisy_rows(BOUNDARIES)
OWN, PAST = 2 * 2 + 4 * 4, 4 * 2  # visible pairs of the noisy rows
PRODUCT = 2 * B * N * D


def attend(q, k, v, past_k=Q, past_v=Q):
  return kernels.attention(q, k, v, context=(past_k, past_v), mask=NOISY)


def pulled_back(argnums):
  def run(*x):
    return jax.grad(lambda *x: jnp.sum(attend(*x)), argnums)(*x)

  return run


ATTENTION = {
  "forward": (attend, 2 * PAST + 2 * OWN),
  "fused": (lambda *x: jax.jvp(attend, x, x), 4 * PAST + 6 * OWN),
  "queries alone": (
    lambda q, k, v: jax.jvp(lambda q: attend(q, k, v), (q,), (q,)),
    4 * PAST + 4 * OWN,
  ),
  "values alone": (
    lambda q, k, v: jax.jvp(lambda v: attend(q, k, v), (v,), (v,)),
    2 * PAST + 3 * OWN,
  ),
  "linear": (
    lambda *x: jax.linearize(attend, *x)[1](*x),
    (2 + 3) * PAST + (2 + 5) * OWN,
  ),
  "backward": (pulled_back((0, 1, 2)), (2 + 3) * PAST + (2 + 5) * OWN),
  "of the values": (pulled_back(2), 2 * PAST + (2 + 2) * OWN),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_counts_the_products_of_visible_pairs(name):
  function, products = ATTENTION[name]
  assert flops.count(function, Q, Q, Q) == (0, PRODUCT * products)


def test_a_cache_counts_as_far_as_it_is_filled():
  def run(q, ranges):
    return kernels.attention(
      q, q, q, context=(Q, Q), context_ranges=ranges, mask=None
    )

  third = flops.RunTime(context=1 / 3)
  ranges = jnp.array([[0, 2]])
  full = flops.count(run, Q, ranges)
  assert full.attention == PRODUCT * 2 * (S * S + S * S)
  part = flops.count(run, Q, ranges, run_time=third)
  assert part.attention == pytest.approx(PRODUCT * 2 * (S * S / 3 + S * S))


def test_what_products_and_attention_move():
  five = lambda a: lax.scan(lambda a, _: (product(a), None), a, length=5)[0]
  assert flops.moved(five, A) == 5 * 4 * (A.size + SQUARE.size + A.size)
  assert flops.moved(jnp.sin, A) == 0
  lse = B * N * S
  assert flops.moved(attend, Q, Q, Q) == 4 * (6 * Q.size + lse)


FRAMES = 3


def wan_by_hand(config, batch):
  """Matrix products of a bidirectional forward pass, one line a layer."""
  d, text, times = config.width, config.text_length, FRAMES
  tokens = FRAMES * 4  # 4 x 4 latents in patches of 2 x 2
  linear = lambda rows, n, m: 2 * batch * rows * n * m
  block = (
    4 * linear(tokens, d, d)  # q, k, v, o
    + 2 * linear(tokens, d, d)  # q and o of cross attention
    + 2 * linear(text, d, d)  # its k and v
    + 2 * linear(tokens, d, config.ffn_width)
  )
  outside = (
    linear(tokens, 4 * config.in_channels, d)
    + linear(text, config.text_width, d)
    + linear(text, d, d)
    + linear(times, config.freq_width, d)
    + linear(times, d, d)
    + linear(times, d, 6 * d)
    + linear(tokens, d, 4 * config.out_channels)
  )
  attention = 2 * 2 * batch * d * (tokens * tokens + tokens * text)
  return outside, config.layers * block, config.layers * attention


@pytest.fixture(scope="module")
def wan():
  x, t, text, _ = tiny_wan.inputs(FRAMES)
  params = tiny_wan.params()

  def run(remat):
    config = dataclasses.replace(tiny_wan.CONFIG, remat=remat)
    model = models.Wan(config)
    loss = lambda p: jnp.sum(model.apply({"params": p}, x, t, text) ** 2)
    return flops.count(loss, params), flops.count(jax.grad(loss), params)

  return run


def test_a_wan_by_hand(wan):
  outside, blocks, attention = wan_by_hand(tiny_wan.CONFIG, 2)
  forward, gradient = wan(None)
  assert forward == (outside + blocks, attention)
  # A product has two cotangents, but none of the network's inputs.
  c = tiny_wan.CONFIG
  inputs = 2 * 2 * (12 * 4 * c.in_channels + 3 * c.text_width) * c.width
  inputs += 2 * 2 * FRAMES * c.freq_width * c.width
  assert gradient.matmul == 3 * (outside + blocks) - inputs
  assert gradient.attention == attention * (1 + 5 / 2)


def test_both_streams_of_teacher_forcing_by_hand():
  x, t, text, clean = tiny_wan.inputs(FRAMES)
  model = models.Wan(tiny_wan.CONFIG)
  forward = lambda p: model.apply(
    {"params": p}, x, t, text, pattern=ChunkPattern(1, 2), context=clean
  )
  c = tiny_wan.CONFIG
  own, past = 4 * 4 + 8 * 8, 8 * 4  # chunks of 4 and 8 tokens
  pairs = (own + past) + (own + past) + 2 * 12 * c.text_length
  expected = c.layers * 2 * 2 * 2 * c.width * pairs
  assert flops.count(forward, tiny_wan.params()).attention == expected


def test_recomputation_counts(wan):
  _, blocks, attention = wan_by_hand(tiny_wan.CONFIG, 2)
  plain, full = wan(None)[1], wan("full")[1]
  assert full.attention - plain.attention == attention
  assert full.matmul - plain.matmul == blocks
  assert wan("attention")[1].attention == plain.attention


def matching(**changes):
  config = tiny.config(
    stages=("diffusion", "matching"), matching=tiny.SELF_FORCING
  )
  return training.read_experiment(config | changes).stages["matching"]


def test_a_step_counts_no_recomputation():
  network = tiny.config()["network"]
  plain, full = matching(), matching(network=network | dict(remat="full"))
  necessary = flops.step(full)
  assert flops.step(plain) == necessary
  counted = flops.count(
    full.train_steps()["student"],
    *(full.state_shapes(), full.frozen_shapes(), full.dataset.shapes()),
    jax.random.key(0),
    run_time=flops.run_time_of(full),
  )
  assert counted.total > necessary.total


def test_rollouts_count_on_average():
  # Four frames, a chunk each, of 1 step or of 1 and 2 in turn.
  frames = dict(data=tiny.config()["data"] | dict(frames=4))
  one = matching(sampling=dict(mid_times={"1": ((),)}), **frames)
  assert flops.run_time_of(one) == flops.RunTime(trips=0.0, context=6 / 16)
  two = matching(sampling=dict(mid_times={"2": ((0.5,), ())}), **frames)
  assert flops.run_time_of(two) == flops.RunTime(
    trips=1 / 8, context=(0 * 2.5 + (1 + 2 + 3) * 2) / (8.5 * 4)
  )
  assert flops.run_time_of(tiny.stage()) == flops.RunTime()
