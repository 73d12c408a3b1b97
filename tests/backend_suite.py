"""What every attention backend must do; a backend's tests inherit this.

    class TestMine(backend_suite.BackendSuite):
      backend = MyBackend()

Expected values come from the equation in numpy float64. Keys that no query
sees hold NaN in every test.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from crcm_jax import kernels

B, N, D = 2, 2, 4
FLOATS = ("q", "k", "v", "context_k", "context_v")


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and masks of one call: queries, own keys, context keys."""

  s: int
  z: int = 0
  y: int = 0
  mask: kernels.BlockMask | None = None
  ranges: tuple = ()
  n: int = N
  d: int = D

  def visible(self):
    """The dense mask [s, y + z]."""
    masked = self.z if self.ranges else self.y + self.z
    own = np.ones((self.s, masked), bool)
    if self.mask is not None:
      own = self.mask.dense()
    if not self.ranges:
      return own
    token = np.arange(self.y)
    seen = np.zeros(self.y, bool)
    for start, stop in self.ranges:
      seen |= (start <= token) & (token < stop)
    return np.concatenate([np.tile(seen, (self.s, 1)), own], 1)


_BOUNDARIES = (0, 4, 9)
_Row, _Mask = kernels.Row, kernels.BlockMask
CASES = {
  "cross": Case(9, 5),
  "block_causal": Case(9, 9, mask=_Mask.block_causal(_BOUNDARIES)),
  "window": Case(
    9, 9, mask=_Mask.block_causal((0, 2, 4, 6, 9), window=1, sink=1)
  ),
  "last_chunk": Case(
    5, 9, mask=_Mask.block_causal(_BOUNDARIES, query_chunk=1, window=2)
  ),
  "packed": Case(18, 18, mask=_Mask.teacher_forcing(_BOUNDARIES)),
  "noisy": Case(9, 9, 9, _Mask.noisy_rows(_BOUNDARIES)),
  "cached": Case(4, 4, 11, ranges=((0, 6),)),
  "cached_first": Case(4, 4, 11, ranges=((0, 0),)),
  "sink_window": Case(4, 4, 11, ranges=((7, 9), (0, 2), (8, 10))),
  "cached_chunks": Case(
    9, 9, 7, _Mask.block_causal(_BOUNDARIES), ranges=((2, 7),)
  ),
  "cache_alone": Case(4, 0, 11, ranges=((3, 10),)),
  "blind": Case(
    6, 6, mask=_Mask((_Row((0, 2), ()), _Row((2, 6), ((1, 4),))), 6)
  ),
  "nothing_cached": Case(4, 0, 11, ranges=((0, 0),)),
}


def arrays(case, seed=0, dtype=np.float32, poison=True):
  """Draws q, k, v, context k, context v; unseen keys are NaN."""
  rng = np.random.default_rng(seed)
  draw = lambda tokens: rng.normal(size=(B, tokens, case.n, case.d)).astype(
    dtype
  )
  out = [draw(m) for m in (case.s, case.z, case.z, case.y, case.y)]
  if poison:
    unseen = ~case.visible().any(0)
    for x, part in zip(
      out[1:],
      [unseen[case.y :]] * 2 + [unseen[: case.y]] * 2,
      strict=True,
    ):
      x[:, part] = np.nan
  return out


def call(case, backend, q, k, v, context_k, context_v, ranges=None):
  """Calls `kernels.attention` as the case says."""
  q, k, v, context_k, context_v = map(
    jnp.asarray, (q, k, v, context_k, context_v)
  )
  if ranges is None and case.ranges:
    ranges = jnp.array(case.ranges, jnp.int32)
  return kernels.attention(
    q,
    k if case.z else None,
    v if case.z else None,
    context=(context_k, context_v) if case.y else None,
    context_ranges=ranges,
    mask=case.mask,
    implementation=backend,
  )


def _joined(case, x):
  """q and all keys and values in float64, unseen ones 0."""
  q, k, v, context_k, context_v = (np.asarray(a, np.float64) for a in x)
  seen = case.visible().any(0)[None, :, None, None]
  join = lambda c, own: np.where(seen, np.concatenate([c, own], 1), 0)
  return q, join(context_k, k), join(context_v, v)


def expected(case, x, t=None, do=None):
  """Output, output tangent and cotangents by the equation."""
  q, k, v = _joined(case, x)
  scale = case.d**-0.5
  s = scale * np.einsum("bsnd,bznd->bnsz", q, k)
  e = np.where(case.visible(), np.exp(s - s.max(-1, keepdims=True)), 0)
  total = e.sum(-1, keepdims=True)
  p = e / np.where(total == 0, 1, total)
  o = np.einsum("bnsz,bznd->bsnd", p, v)
  to = grads = None
  if t is not None:
    tq, tk, tv = _joined(case, t)
    ts = np.einsum("bsnd,bznd->bnsz", tq, k)
    ts = scale * (ts + np.einsum("bsnd,bznd->bnsz", q, tk))
    tp = p * (ts - (p * ts).sum(-1, keepdims=True))
    to = np.einsum("bnsz,bznd->bsnd", tp, v)
    to += np.einsum("bnsz,bznd->bsnd", p, tv)
  if do is not None:
    dp = np.einsum("bsnd,bznd->bnsz", do, v)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    dq = np.einsum("bnsz,bznd->bsnd", ds, k)
    dk = np.einsum("bnsz,bsnd->bznd", ds, q)
    dv = np.einsum("bnsz,bsnd->bznd", p, do)
    y = case.y
    grads = [dq, dk[:, y:], dv[:, y:], dk[:, :y], dv[:, :y]]
  return o, to, grads


def close(actual, wanted, tolerance=2e-6):
  """Asserts the error's norm relative to the wanted array's."""
  actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted)
  assert actual.shape == wanted.shape
  error = np.linalg.norm(actual - wanted)  # NaN fails too
  assert error <= tolerance * max(np.linalg.norm(wanted), 1e-3)


ACTIVE = {
  "q": ("q",),
  "own": ("q", "k", "v"),
  "context": ("context_k", "context_v"),
}


class BackendSuite:
  """Inherit, and set `backend`.

  Attributes:
    backend: What is tested.
    half: A dtype of 16 bits that it computes in.
  """

  backend: kernels.Backend
  half = jnp.bfloat16

  @pytest.mark.parametrize("name", CASES)
  def test_value_tangent_cotangent(self, name):
    """One compiled program: output, jvp and vjp in all arguments."""
    case = CASES[name]
    x, t = arrays(case), arrays(case, 1)
    do = np.random.default_rng(2).normal(size=x[0].shape).astype(np.float32)
    attend = lambda *x: call(case, self.backend, *x)

    @jax.jit
    def run(x, t, do):
      o, vjp = jax.vjp(attend, *x)
      return o, jax.jvp(attend, x, t), vjp(do)

    o, (primal, to), grads = run(tuple(x), tuple(t), do)
    want_o, want_to, want_grads = expected(case, x, t, do)
    close(o, want_o)
    close(primal, want_o)
    close(to, want_to)
    for grad, want in zip(grads, want_grads, strict=True):
      close(grad, want)

  @pytest.mark.parametrize("active", ACTIVE)
  def test_some_operands_active(self, active):
    """Tangents and cotangents of a subset equal those with zeros elsewhere."""
    case = CASES["noisy"]
    live = [name in ACTIVE[active] for name in FLOATS]
    x, t = arrays(case), arrays(case, 1)
    do = np.ones_like(x[0])

    def attend(*moved):
      moved = iter(moved)
      full = [next(moved) if a else b for a, b in zip(live, x, strict=True)]
      return call(case, self.backend, *full)

    @jax.jit
    def run(x, t):
      _, vjp = jax.vjp(attend, *x)
      return jax.jvp(attend, x, t)[1], vjp(do)

    pick = lambda xs: tuple(a for a, m in zip(xs, live, strict=True) if m)
    to, grads = run(pick(x), pick(t))
    t = [a if m else 0 * a for a, m in zip(t, live, strict=True)]
    _, want_to, want_grads = expected(case, x, t, do)
    close(to, want_to)
    for grad, want in zip(grads, pick(want_grads), strict=True):
      close(grad, want)

  def _value_and_grad(self, case, wrap):
    """Checks value and gradients of `sum(o**2)`, with o = wrap(attend)."""
    x = tuple(map(jnp.asarray, arrays(case)))
    attend = wrap(lambda *x: call(case, self.backend, *x))

    def loss(*x):
      o = attend(*x)
      return (o**2).sum(), o

    grad = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)
    grads, o = jax.jit(grad)(*x)
    want_o, _, _ = expected(case, x)
    close(o, want_o)
    for got, want in zip(
      grads, expected(case, x, do=2 * want_o)[2], strict=True
    ):
      close(got, want)

  def test_checkpoint(self):
    self._value_and_grad(CASES["noisy"], jax.checkpoint)

  def test_checkpoint_that_saves_attention(self):
    self._value_and_grad(
      CASES["noisy"],
      lambda f: jax.checkpoint(f, policy=kernels.save_attention),
    )

  def test_cond(self):
    self._value_and_grad(
      CASES["cached"],
      lambda f: (
        lambda *x: jax.lax.cond(x[0].sum() < 1e9, f, lambda *x: x[0], *x)
      ),
    )

  @pytest.mark.parametrize(
    ("name", "check_vma"),
    [("noisy", True), ("cached", True), ("cached", False)],
  )
  def test_shard_map(self, name, check_vma):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), (AxisType.Auto,))
    self._value_and_grad(
      CASES[name],
      lambda f: jax.shard_map(
        f,
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=check_vma,
      ),
    )

  def test_shard_map_of_replicated_context(self):
    """A context that all shards share gets the sum of their cotangents."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), (AxisType.Auto,))
    specs = (P("x"), P("x"), P("x"), P(), P())
    self._value_and_grad(
      CASES["noisy"],
      lambda f: jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("x")),
    )

  def test_scan_over_layers(self):
    """Derivatives through a scan equal those through an unrolled loop."""
    case = CASES["block_causal"]
    x, t = arrays(case)[:3], arrays(case, 1)[:3]
    layer = lambda h, w: call(
      case, self.backend, h * w, x[1], h, *arrays(case)[3:]
    )
    scales = np.array([1.0, 0.5, 2.0], np.float32)

    def scanned(h, w):
      return jax.lax.scan(lambda h, w: (layer(h, w), None), h, w)[0]

    def unrolled(h, w):
      for i in range(3):
        h = layer(h, w[i])
      return h

    def derivatives(f):
      tangent = jax.jvp(f, (x[0], scales), (t[0], 1 + scales))
      grad = jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))
      return tangent, grad(x[0], scales)

    for got, want in zip(
      jax.tree.leaves(jax.jit(derivatives, static_argnums=0)(scanned)),
      jax.tree.leaves(jax.jit(derivatives, static_argnums=0)(unrolled)),
      strict=True,
    ):
      close(got, np.asarray(want, np.float64))

  def test_vmap(self):
    """vmap of jvp, jvp of vmap, and gradients, some operands unmapped."""
    case = CASES["noisy"]
    xs = [
      np.stack(a)
      for a in zip(*(arrays(case, i) for i in range(3)), strict=True)
    ]
    ts = np.stack([arrays(case, i)[0] for i in range(3, 6)])
    x = arrays(case)
    attend = lambda q, k: call(case, self.backend, q, k, *x[2:])
    tangent = lambda q, k, tq: jax.jvp(lambda q: attend(q, k), (q,), (tq,))
    grad = jax.grad(lambda q, k: (attend(q, k) ** 2).sum(), argnums=(0, 1))

    @jax.jit
    def mapped(q, k, tq):
      over = jax.vmap(attend, (0, None))
      return (
        jax.vmap(tangent, (0, None, 0))(q, k, tq),
        jax.jvp(lambda q: over(q, k), (q,), (tq,)),
        jax.vmap(grad, (0, None))(q, k),
      )

    first, second, grads = mapped(xs[0], x[1], ts)
    for i in range(3):
      y = [xs[0][i], *x[1:]]
      t = [ts[i], *(0 * a for a in x[1:])]
      o, to, _ = expected(case, y, t)
      _, _, want = expected(case, y, do=2 * o)
      for got, wanted in (
        (first[0][i], o),
        (first[1][i], to),
        (second[0][i], o),
        (second[1][i], to),
        (grads[0][i], want[0]),
        (grads[1][i], want[1]),
      ):
        close(got, wanted)

  def test_vmap_over_ranges(self):
    """Sequences of one batch may have caches of different lengths."""
    case = dataclasses.replace(CASES["cached"], ranges=((0, 11),))
    x = arrays(case)
    ranges = jnp.array([[[0, 2]], [[0, 0]], [[3, 11]]], jnp.int32)
    attend = lambda q, r: call(case, self.backend, q, *x[1:], ranges=r)
    run = jax.jit(
      jax.vmap(
        lambda q, r: jax.jvp(lambda q: attend(q, r), (q,), (jnp.ones_like(q),)),
        (None, 0),
      )
    )
    o, to = run(x[0], ranges)
    t = [np.ones_like(x[0]), *(0 * a for a in x[1:])]
    for i, r in enumerate(np.asarray(ranges)):
      one = dataclasses.replace(case, ranges=tuple(map(tuple, r)))
      want_o, want_to, _ = expected(one, x, t)
      close(o[i], want_o)
      close(to[i], want_to)

  def test_one_program_serves_every_length(self):
    """The context's ranges are run-time values."""
    case = CASES["cached"]
    run = jax.jit(lambda x, r: call(case, self.backend, *x, ranges=r))
    x = arrays(case, poison=False)
    for written in (0, 4, 11):
      one = dataclasses.replace(case, ranges=((0, written),))
      got = run(tuple(x), np.array([[0, written]], np.int32))
      close(got, expected(one, x)[0])
    assert run._cache_size() == 1

  def test_float64(self):
    case = CASES["noisy"]
    x = arrays(case, dtype=np.float64)
    t = arrays(case, 1, np.float64)
    with jax.enable_x64(True):
      attend = lambda *x: call(case, self.backend, *x)
      o, to = jax.jit(lambda x, t: jax.jvp(attend, x, t))(tuple(x), tuple(t))
      assert o.dtype == to.dtype == np.float64
    want_o, want_to, _ = expected(case, x, t)
    close(o, want_o, 1e-14)
    close(to, want_to, 1e-14)

  def test_error_in_16_bits_is_that_of_the_equation(self):
    """At most twice the error of the equation evaluated in the same dtype."""
    check_random_problem(self.backend, 0, self.half, most_frames=3)

  @pytest.mark.parametrize("what", ["value", "key", "query"])
  def test_nan_stays_where_it_is_seen(self, what):
    """A NaN in the last chunk reaches no earlier chunk."""
    case = CASES["block_causal"]
    x, t = arrays(case), arrays(case, 1)
    clean = expected(case, x, t, np.ones_like(x[0]))
    i = {"query": 0, "key": 1, "value": 2}[what]
    x[i][:, 4:] = t[i][:, 4:] = np.nan
    attend = lambda *x: call(case, self.backend, *x)

    @jax.jit
    def run(x, t, do):
      return *jax.jvp(attend, x, t), jax.vjp(attend, *x)[1](do)

    o, to, grads = run(tuple(x), tuple(t), np.ones_like(x[0]))
    assert np.isnan(o[:, 4:]).all()
    close(o[:, :4], clean[0][:, :4])
    close(to[:, :4], clean[1][:, :4])
    close(grads[0][:, :4], clean[2][0][:, :4])


def random_case(rng, most_frames):
  """Draws sizes and a mask: streams, windows, sinks, prefixes, odd lengths."""
  frame = int(rng.integers(1, 40))
  frames = int(rng.integers(1, most_frames + 1))
  first = int(rng.integers(1, frames + 1))
  rest = int(rng.choice([r for r in (1, 2, 3) if (frames - first) % r == 0]))
  bounds = [0, *(frame * f for f in range(first, frames + 1, rest))]
  s = frame * frames
  limits = dict(window=None, sink=0)
  if rng.random() < 0.5:
    limits = dict(window=int(rng.integers(1, 4)), sink=int(rng.integers(0, 3)))
  y = int(rng.integers(1, 150))
  start, stop = sorted(rng.integers(0, y + 1, 2).tolist())
  last = len(bounds) - 2
  cases = [
    Case(s, int(rng.integers(1, 200))),
    Case(s, s, mask=_Mask.block_causal(bounds, **limits)),
    Case(s, s, s, _Mask.noisy_rows(bounds, **limits)),
    Case(2 * s, 2 * s, mask=_Mask.teacher_forcing(bounds, **limits)),
    Case(
      bounds[-1] - bounds[-2],
      s,
      mask=_Mask.block_causal(bounds, query_chunk=last, **limits),
    ),
    Case(s, s, y, ranges=((0, stop), (start, stop))),
    Case(s, s, y, _Mask.block_causal(bounds, **limits), ((0, y),)),
    Case(s, 0, y, ranges=((start, stop),)),
  ]
  n, d = int(rng.integers(1, 4)), int(rng.choice([16, 24, 64, 80, 128]))
  return dataclasses.replace(cases[rng.integers(len(cases))], n=n, d=d)


def _dense(case, x):
  """The equation in the dtype of its arguments, for its rounding error."""
  k, v = (jnp.concatenate(a, 1) for a in ((x[3], x[1]), (x[4], x[2])))
  scale = jnp.asarray(case.d**-0.5, k.dtype)
  s = scale * jnp.einsum("bsnd,bznd->bnsz", x[0], k, precision="highest")
  visible = case.visible()[None, None]
  s = jnp.where(visible, s, jnp.asarray(-3e4, s.dtype))
  p = jnp.where(visible, jax.nn.softmax(s), jnp.zeros((), s.dtype))
  return jnp.einsum("bnsz,bznd->bsnd", p, v, precision="highest")


def check_random_problem(backend, seed, dtype, most_frames=8):
  """Checks one random call: output, tangent, cotangents, twice.

  The expected values are float64's; the error may be twice that of the
  equation in `dtype`. A random subset of operands has tangents.
  """
  rng = np.random.default_rng(seed)
  case = random_case(rng, most_frames)
  round_ = lambda a: np.asarray(jnp.asarray(a, dtype), np.float32)
  x, t = (list(map(round_, arrays(case, seed + i))) for i in (0, 1))
  do = round_(rng.normal(size=x[0].shape))
  live = rng.random(5) < 0.6
  live[rng.integers(3)] = True
  t = [a if m else 0 * np.nan_to_num(a) for a, m in zip(t, live, strict=True)]

  def derivatives(attend, x, t, do):
    def of_live(*moved):
      moved = iter(moved)
      return attend(
        *[next(moved) if m else a for m, a in zip(live, x, strict=True)]
      )

    pick = lambda xs: [a for a, m in zip(xs, live, strict=True) if m]
    o, to = jax.jvp(of_live, pick(x), pick(t))
    return o, to, jax.vjp(of_live, *pick(x))[1](do)

  cast = lambda xs: [jnp.asarray(a, dtype) for a in xs]
  args = (cast(x), cast(t), jnp.asarray(do, dtype))
  run = jax.jit(
    lambda *args: derivatives(lambda *x: call(case, backend, *x), *args)
  )
  got, again = jax.tree.leaves(run(*args)), jax.tree.leaves(run(*args))
  rough = jax.jit(lambda *args: derivatives(lambda *x: _dense(case, x), *args))(
    *(jax.tree.map(jnp.nan_to_num, args))
  )
  o, to, grads = expected(case, x, t, do)
  want = [o, to, *[g for g, m in zip(grads, live, strict=True) if m]]
  for a, b, r, w in zip(got, again, jax.tree.leaves(rough), want, strict=True):
    np.testing.assert_array_equal(a, b)  # bit for bit
    assert a.dtype == dtype
    error = lambda a, w=w: np.linalg.norm(np.asarray(a, np.float64) - w)
    limit = 2 * error(r) + 2e-6 * np.linalg.norm(w)
    assert error(a) <= limit, (case, live.tolist())  # NaN fails too
