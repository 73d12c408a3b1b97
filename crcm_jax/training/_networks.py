"""Parameters to start from: drawn afresh, or handed over by what was trained.

Stages hand parameters to each other by name. A *source* is

  WHERE[:ema|:live][@STEP]

where WHERE is a stage of the same experiment, the workdir of a stage, or a
safetensors file. Without more, it is the moving average of the newest
checkpoint.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import crcm_jax
from crcm_jax import models
from crcm_jax._typing import Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training._checkpoints import Checkpoints

_SOURCE = re.compile(
  r"(?P<where>[^:@]+)(:(?P<which>ema|live))?(@(?P<step>\d+))?"
)


class Source(NamedTuple):
  """Where parameters come from, parsed."""

  where: str
  which: str = "ema"
  step: int | None = None


class Origin(NamedTuple):
  """Parameters and what they were trained for.

  Attributes:
    params: the parameters.
    pattern: the chunks they know; None for a bidirectional network.
    about: what their checkpoint or file says of itself.
  """

  params: Params
  pattern: ChunkPattern | None
  about: dict[str, Any]


def parse_source(text: str) -> Source:
  """Reads `WHERE[:ema|:live][@STEP]`.

  Args:
    text: the source.

  Returns:
    Its parts.

  Raises:
    ValueError: if it has another form.

  Example:
    >>> parse_source("runs/digits/consistency:live@300")
    Source(where='runs/digits/consistency', which='live', step=300)
  """
  match = _SOURCE.fullmatch(text)
  if match is None:
    raise ValueError(
      "a source of parameters must have the form WHERE[:ema|:live][@STEP];"
      f" got {text!r}."
    )
  step = match["step"]
  return Source(
    match["where"], match["which"] or "ema", int(step) if step else None
  )


def load_source(
  text: str, *, workdir: pathlib.Path, stages: Iterable[str] = ()
) -> Origin:
  """Loads the parameters that a source names.

  Args:
    text: the source.
    workdir: folder of the experiment, which holds its stages' workdirs.
    stages: names of the experiment's stages.

  Returns:
    The parameters as NumPy arrays, in the dtype they were stored in.

  Raises:
    ValueError: if there is nothing of that name, or no such checkpoint.
  """
  source = parse_source(text)
  if source.where in stages:
    return _from_workdir(workdir / source.where, source)
  path = find(source.where)
  if path.suffix == ".safetensors":
    params, about = models.read_params(path)
    return Origin(params, _pattern(about), about)
  return _from_workdir(path, source)


def find(name: str) -> pathlib.Path:
  """Returns the path of a file or folder that a config names.

  Args:
    name: a path; a relative one is sought in the current folder, then in the
      checkout that the package lies in.

  Raises:
    ValueError: if it is in neither.
  """
  checkout = pathlib.Path(crcm_jax.__file__).parent.parent
  for folder in (pathlib.Path.cwd(), checkout):
    if (folder / name).exists():
      return folder / name
  raise ValueError(
    f"{name!r} must name a stage of the experiment, a workdir or a file; there"
    f" is none in {str(pathlib.Path.cwd())!r} or {str(checkout)!r}."
  )


def _from_workdir(workdir: pathlib.Path, source: Source) -> Origin:
  if not (workdir / "checkpoints").is_dir():
    raise ValueError(
      f"{str(workdir)!r} must be the workdir of a stage that was trained; it"
      " has no checkpoints. Train that stage first."
    )
  key = {"ema": "ema", "live": "student"}[source.which]
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    restored = checkpoints.read(source.step, only=key)
  about = {"at_step": restored.step, **restored.config}
  return Origin(restored.state[key], _pattern(about), about)


def _pattern(about: Mapping[str, Any]) -> ChunkPattern | None:
  pattern = about.get("pattern")
  return None if pattern is None else ChunkPattern(**pattern)


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: models.Wan, key: PRNGKeyArray) -> Params:
  """Draws parameters; their shapes depend on no video's size, nor mesh."""
  config = model.config
  model = models.Wan(config)  # on one device
  x = jnp.zeros((1, *config.patch, config.in_channels))
  text = jnp.zeros((1, config.text_length, config.text_width))
  return model.init(key, x, jnp.zeros((1, 1)), text)["params"]


def param_shapes(model: models.Wan) -> Params:
  """Returns the shapes and dtypes of a network's parameters."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def adopt(
  origin: Origin,
  model: models.Wan,
  *,
  pattern: ChunkPattern | None,
  name: str,
) -> Params:
  """Returns handed-over parameters if they fit their new use.

  Args:
    origin: where they come from.
    model: the network that shall use them; gives shapes and dtype.
    pattern: the chunks of that use; None if it is bidirectional.
    name: the config key to name in messages.

  Returns:
    The parameters in the network's dtype, as NumPy arrays, since one device
    may not hold them all; those of a second time input are added where the
    network has one and the parameters are of one without.

  Raises:
    ValueError: if they were trained for another chunk pattern (a
      bidirectional network may start any), or for another network.
  """
  if origin.pattern is not None and origin.pattern != pattern:
    raise ValueError(
      f"`{name}` must come from a network of the pattern {pattern}; this one"
      f" was trained with {origin.pattern}. Name another source, or set"
      " `config.pattern` to that of this one."
    )
  params = origin.params
  if model.config.end_time and "end_embedding" not in params:
    # Fresh, the second time's embedding adds zero: what was trained stays.
    config = dataclasses.replace(model.config, end_time=False)
    _, params = models.add_end_time(params, config, jax.random.key(0))
  expected, given = _flat(param_shapes(model)), _flat(params)
  if missing := sorted(expected.keys() ^ given.keys()):
    raise ValueError(
      f"`{name}` must have the parameters of `config.network`, or of what"
      f" `networks` makes of it; not in both: {missing[:3]}."
    )
  for path, leaf in expected.items():
    if leaf.shape != given[path].shape:
      raise ValueError(
        f"`{name}` must have the sizes of `config.network`, or of what"
        f" `networks` makes of it, {path}: {leaf.shape}; got"
        f" {given[path].shape}."
      )
  return jax.tree.map(
    lambda leaf, like: np.asarray(leaf, like.dtype),
    params,
    param_shapes(model),
  )


def _flat(tree: Params) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
