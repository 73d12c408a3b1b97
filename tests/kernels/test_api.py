"""What `kernels.attention` refuses, and how it picks a backend."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import kernels
from crcm_jax.kernels import api

X = jnp.zeros((1, 4, 2, 8))
CACHE = jnp.zeros((1, 9, 2, 8))


@dataclasses.dataclass(frozen=True)
class Picky(kernels.Xla):
  """A backend that supports one pair of keys and values only."""

  name: str = "picky"

  def supports(self, problem, x):
    """Refuses contexts."""
    if problem.pairs > 1:
      raise NotImplementedError("it reads no `context`")


@pytest.fixture
def picky(monkeypatch):
  monkeypatch.setattr(api, "BACKENDS", {"picky": Picky(), "xla": kernels.Xla()})
  api._warn_once.cache_clear()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  ("error", "message", "args", "options"),
  [
    (
      ValueError,
      "`q` must have the axes [b s n d] (batch, tokens, heads, width); got "
      "shape (4, 2, 8).",
      (X[0], X, X),
      {},
    ),
    (
      ValueError,
      "keys and values must be (1, tokens, 2, 8) to fit `q` of shape "
      "(1, 4, 2, 8); got (1, 2, 4, 8). Axes are [b z n d], heads after",
      (X, X.swapaxes(1, 2), X),
      {},
    ),
    (
      ValueError,
      "keys and values must have one shape; got (1, 4, 2, 8) and",
      (X, X, CACHE),
      {},
    ),
    (
      ValueError,
      "`k` and `v` must be given together; one of them is None.",
      (X, X, None),
      {},
    ),
    (
      ValueError,
      "`k`, `v` or `context` must be given: there is nothing to attend to.",
      (X, None, None),
      {},
    ),
    (
      TypeError,
      "must have the dtype of `q`, float32; got bfloat16. Cast them",
      (X, X, X.astype(jnp.bfloat16)),
      {},
    ),
    (
      TypeError,
      "`q` must be of a floating-point dtype; got int32.",
      [jnp.zeros(X.shape, jnp.int32)] * 3,
      {},
    ),
    (
      ValueError,
      "`mask` must be about 4 queries and 4 keys [context | own]; it is about "
      "3 and 3.",
      (X, X, X),
      dict(mask=kernels.BlockMask.full(3, 3)),
    ),
    (
      ValueError,
      "4 own keys (`context_ranges` rules the context); it is about 4 and 13.",
      (X, X, X),
      dict(
        context=(CACHE, CACHE),
        context_ranges=jnp.array([[0, 2]]),
        mask=kernels.BlockMask.full(4, 13),
      ),
    ),
    (
      ValueError,
      "`context_ranges` needs a `context` to be about.",
      (X, X, X),
      dict(context_ranges=jnp.array([[0, 2]])),
    ),
    (
      ValueError,
      "`context_ranges` must be int32 [r, 2], 1 <= r <= 4, of (start, stop) "
      "tokens; got shape (2,).",
      (X, X, X),
      dict(context=(CACHE, CACHE), context_ranges=jnp.array([0, 2])),
    ),
    (
      TypeError,
      "`context_ranges` must be integers; got float32.",
      (X, X, X),
      dict(context=(CACHE, CACHE), context_ranges=jnp.array([[0.0, 2.0]])),
    ),
    (
      ValueError,
      "`implementation` must be one of " + str(sorted(kernels.BACKENDS)),
      (X, X, X),
      dict(implementation="cuda"),
    ),
  ],
)
def test_messages(error, message, args, options):
  with pytest.raises(error, match=re.escape(message)):
    kernels.attention(*args, **options)


@pytest.mark.parametrize("number", [0, 5])
def test_no_range_and_five_ranges_are_refused(number):
  ranges = jnp.zeros((number, 2), jnp.int32)
  with pytest.raises(ValueError, match="Join neighbouring ranges"):
    kernels.attention(X, X, X, context=(CACHE, CACHE), context_ranges=ranges)


def test_an_unknown_rule_is_refused(monkeypatch):
  monkeypatch.setenv("CRCM_ATTENTION_RULE", "fast")
  with pytest.raises(ValueError, match="must be 'fused' or 'unfused'"):
    kernels.attention(X, X, X)


@pytest.mark.usefixtures("picky")
def test_falls_back_with_one_warning():
  with pytest.warns(UserWarning, match="from 'picky': it reads no `context`"):
    kernels.attention(X, X, X, context=(CACHE, CACHE))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    kernels.attention(X, X, X, context=(CACHE, CACHE))


@pytest.mark.usefixtures("picky")
def test_a_named_backend_raises_its_reason():
  with pytest.raises(NotImplementedError, match="it reads no `context`"):
    kernels.attention(X, X, X, context=(X, X), implementation="picky")


@pytest.mark.usefixtures("picky")
def test_prefers_the_first_that_supports_the_call():
  eqns = jax.make_jaxpr(kernels.attention)(X, X, X).eqns
  assert [e.params["problem"].backend.name for e in eqns] == ["picky"]


def test_a_missing_package_is_named_with_its_cure():
  """jax-triton cannot be imported without a GPU's JAX."""
  with pytest.raises(
    NotImplementedError, match=r"pip install 'crcm_jax\[gpu\]'"
  ):
    kernels.attention(X, X, X, implementation="triton")


@pytest.mark.parametrize(
  ("x", "scale", "message"),
  [
    (jnp.ones((1, 4, 2, 320)), None, "heads of at most 256; got 320"),
    (jnp.ones((1, 4, 2, 8), jnp.float8_e4m3fn), None, "got float8_e4m3fn"),
    (X, -1.0, "positive `scale`; got -1.0"),
    (jax.ShapeDtypeStruct((1, 2**27, 2, 8), X.dtype), None, "in 32 bits"),
  ],
)
def test_triton_refuses_by_name(x, scale, message):
  attend = lambda x: kernels.attention(
    x, x, x, scale=scale, implementation="triton"
  )
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, x)


@pytest.mark.parametrize("implementation", kernels.BACKENDS)
@pytest.mark.parametrize("ranges", [None, jnp.array([[0, 3]])])
def test_empty_arrays(implementation, ranges):
  """No backend is asked to walk over nothing; the others would refuse X."""
  empty = X[:, :0]
  attend = functools.partial(kernels.attention, implementation=implementation)
  context = dict(context=(empty, empty), context_ranges=ranges)
  assert attend(empty, X, X).shape == empty.shape
  np.testing.assert_array_equal(attend(X, empty, empty), 0)
  np.testing.assert_array_equal(attend(X, None, None, **context), 0)
  grad = jax.grad(lambda x: attend(x, empty, empty, **context).sum())(X)
  np.testing.assert_array_equal(grad, 0)


def test_an_empty_context_is_none():
  empty = X[:, :0]
  for ranges in (None, jnp.array([[0, 3]])):
    o = kernels.attention(
      X, X, X + 1, context=(empty, empty), context_ranges=ranges
    )
    assert (o == 1).all()


def test_scale():
  q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
  doubled = kernels.attention(2 * q, q, q, scale=0.1)
  assert jnp.allclose(doubled, kernels.attention(q, q, q, scale=0.2))


def test_tokens_may_have_several_axes():
  keys = jax.random.split(jax.random.key(0), 5)
  flat = [jax.random.normal(key, (1, 6, 2, 8)) for key in keys]
  grid = [x.reshape(1, 2, 3, 2, 8) for x in flat]
  mask = kernels.BlockMask.noisy_rows((0, 3, 6))

  def derivatives(q, k, v, *context):
    def attend(q, k, v, *context):
      return kernels.attention(q, k, v, context=context, mask=mask)

    x = (q, k, v, *context)
    o, tangent = jax.jvp(attend, x, x)
    return o, tangent, jax.vjp(attend, *x)[1](o)

  want = jax.tree.leaves(jax.jit(derivatives)(*flat))
  got = jax.tree.leaves(jax.jit(derivatives)(*grid))
  for a, b in zip(got, want, strict=True):
    assert a.shape == (1, 2, 3, 2, 8)
    assert jnp.allclose(a.reshape(b.shape), b, atol=1e-6)
