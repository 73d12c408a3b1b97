"""Prompts to embeddings: cleaned, tokenised, encoded, kept on disk.

Wan reads 512 embeddings a prompt; after the last token they are zero.
"""

import dataclasses
import hashlib
import html
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._extras import require
from crcm_jax._typing import Float, Params
from crcm_jax.models._tensor_files import in_memory, open_tensors, write_tensors
from crcm_jax.models._text_encoder import TextEncoder

Tokenize: TypeAlias = Callable[[str], list[int]]
"""A prompt's tokens, the end-of-sequence token last."""

Embed: TypeAlias = Callable[[Sequence[str]], Float[np.ndarray, "b l d"]]
"""The embeddings of prompts."""

TEXT_TOKENS = 512
"""Tokens of a prompt, in every Wan 2.1."""

_END = 1  # T5's </s>


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenize:
  """Loads a tokenizer from a local file.

  Args:
    path: `tokenizer.json`, a sentencepiece model (`spiece.model`), or a folder
      that holds either, such as `google/umt5-xxl` of a Wan checkpoint.

  Returns:
    A function of a prompt that returns its tokens.

  Raises:
    ImportError: if the extra `text` is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if the file is no tokenizer.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    names = ("tokenizer.json", "spiece.model")
    found = [path / name for name in names if (path / name).is_file()]
    path = found[0] if found else path / names[0]
  if not path.is_file():
    raise FileNotFoundError(
      f"`path` must be a tokenizer.json or spiece.model; there is no {path}."
      " Wan's is the folder google/umt5-xxl beside its checkpoint."
    )
  load = _load_json if path.suffix == ".json" else _load_sentencepiece
  try:
    return load(path)
  except ImportError:
    raise
  except Exception as error:  # tokenizers raises plain Exception
    raise ValueError(
      f"`path` must be a tokenizer.json or a sentencepiece model; {path} is not"
      f" ({error}). Copy it again."
    ) from error


def _load_json(path: pathlib.Path) -> Tokenize:
  tokenizers = require("tokenizers", extra="text")
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return lambda prompt: _ended(tokenizer.encode(prompt).ids)


def _load_sentencepiece(path: pathlib.Path) -> Tokenize:
  library = require("sentencepiece", extra="text")
  processor = library.SentencePieceProcessor(model_file=str(path))
  return lambda prompt: _ended(processor.encode(prompt))


def _ended(tokens: list[int]) -> list[int]:
  return tokens if tokens[-1:] == [_END] else [*tokens, _END]


def clean_prompt(prompt: str) -> str:
  """Resolves HTML entities and makes every run of white space one blank."""
  prompt = html.unescape(html.unescape(prompt))
  return re.sub(r"\s+", " ", prompt).strip()


def prompt_tokens(
  prompt: str, tokenize: Tokenize, length: int = TEXT_TOKENS
) -> list[int]:
  """Returns a prompt's tokens, at most `length`, the last one ending it.

  A longer prompt is cut, with a warning.
  """
  tokens = tokenize(clean_prompt(prompt))
  if len(tokens) <= length:
    return tokens
  warnings.warn(
    f"a prompt has {len(tokens)} tokens and is cut to {length}: the network"
    f" reads no more. It begins {prompt[:40]!r}.",
    stacklevel=2,
  )
  return [*tokens[: length - 1], tokens[-1]]


def prompt_embedder(
  model: TextEncoder,
  params: Params,
  tokenize: Tokenize,
  *,
  length: int = TEXT_TOKENS,
) -> Embed:
  """Returns a function that embeds prompts.

  Args:
    model: the text encoder.
    params: its parameters, wherever they live.
    tokenize: its tokenizer.
    length: embeddings a prompt; longer ones are cut with a warning.

  Returns:
    A function of prompts; of each it returns `length` float32 embeddings, zero
    after its last token.
  """

  @jax.jit
  def encode(params, tokens, mask):
    x = jnp.asarray(model.apply({"params": params}, tokens, mask))
    return jnp.where(mask[..., None], x, 0).astype(jnp.float32)

  def embed(prompts: Sequence[str]) -> Float[np.ndarray, "b l d"]:
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, prompt in enumerate(prompts):
      row = prompt_tokens(prompt, tokenize, length)
      tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return np.asarray(encode(params, tokens, mask))

  return embed


@dataclasses.dataclass(frozen=True)
class CachedEmbedder:
  """Embeds prompts as `embed` does, each once: they are kept on disk.

  Attributes:
    embed: embeds those that are not there, one after another; not called if
      all are. It may load the encoder when it is called.
    folder: where they are kept, a safetensors file a prompt.
    identity: what the embeddings depend on beside the prompt, such as the hash
      of the encoder's checkpoint; another one shares nothing.
  """

  embed: Callable[[Sequence[str]], Iterable[Float[np.ndarray, "l d"]]]
  folder: str | os.PathLike[str]
  _: dataclasses.KW_ONLY
  identity: str

  def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "b l d"]:
    """Returns the embeddings of prompts."""
    self.prepare(prompts)
    return np.stack([np.asarray(self._read(prompt)) for prompt in prompts])

  def prepare(self, prompts: Sequence[str]) -> None:
    """Embeds the prompts that are not on disk, and keeps none in memory."""
    pathlib.Path(self.folder).mkdir(parents=True, exist_ok=True)
    missing = [p for p in dict.fromkeys(prompts) if self._read(p) is None]
    made = self.embed(missing) if missing else ()
    for prompt, array in zip(missing, made, strict=True):
      _write(self._file_of(prompt), prompt, array)

  def _read(self, prompt: str) -> np.ndarray | None:
    return _read(self._file_of(prompt))

  def _file_of(self, prompt: str) -> pathlib.Path:
    text = f"{self.identity}\0{clean_prompt(prompt)}"
    name = hashlib.sha256(text.encode()).hexdigest()
    return pathlib.Path(self.folder, f"{name}.safetensors")


def _write(path: pathlib.Path, prompt: str, array: np.ndarray) -> None:
  """Writes an embedding without the zeros at its end."""
  used = np.flatnonzero(array.any(axis=-1))
  stop = used[-1] + 1 if len(used) else 0
  arrays = {"embedding": array[:stop], "length": np.int64(len(array))}
  write_tensors(path, in_memory(arrays).tensors, {"prompt": prompt})


def _read(path: pathlib.Path) -> np.ndarray | None:
  """Reads an embedding; None if there is none, or it is broken."""
  if not path.exists():
    return None
  try:
    tensors = open_tensors(path).tensors
    embedding, length = (tensors[k].read() for k in ("embedding", "length"))
  except (ValueError, KeyError) as error:
    warnings.warn(f"{path} is broken and made anew ({error})", stacklevel=2)
    return None
  return np.pad(embedding, ((0, int(length) - len(embedding)), (0, 0)))
