"""Array types shared by all modules, and what each axis letter means.

Letters mean one thing everywhere: b batch, f latent frames, h w latent size,
c channels, s query tokens, z key tokens (own stream), y context tokens,
n heads, d head width or embedding width, l text tokens.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import PRNGKeyArray as PRNGKeyArray

Params: TypeAlias = Any
"""A pytree of network parameters."""

Velocity: TypeAlias = Callable[[Array, Array], Array]
"""`velocity(x_t, t) -> v`, conditioning closed over."""

ParametricVelocity: TypeAlias = Callable[[Params, Array, Array], Array]
"""`velocity(params, x_t, t) -> v`: the network that a loss differentiates."""
