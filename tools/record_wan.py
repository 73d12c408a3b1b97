"""Records what PyTorch's implementations of Wan's networks compute.

The tests compare with `tests/golden/wan_*.npz`, so they need no torch. Weights
and inputs follow from their names (`tests/wan_weights.py`); a file holds only
outputs, and the names and shapes of the full-size networks' parameters.

  python tools/record_wan.py           records anew
  python tools/record_wan.py --check   compares with what is recorded

Needs torch, diffusers and transformers (the extra `parity`); `make parity`
installs them into an environment of their own and checks.
"""

import functools
import io
import json
import pathlib
import sys

import diffusers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import wan_weights  # noqa: E402  # pyright: ignore[reportMissingImports]

from crcm_jax import models  # noqa: E402
from crcm_jax.models import _torch  # noqa: E402


def main(arguments: list[str]) -> int:
  """Records, or compares; returns the exit status."""
  torch.set_grad_enabled(False)
  stale = []
  for name, record in RECORDINGS.items():
    path, arrays = GOLDEN / f"wan_{name}.npz", record()
    if arguments == ["--check"]:
      found = list(_differences(path, arrays))
      print(f"{path.name}: {found or 'as recorded'}")
      stale += found
    else:
      np.savez_compressed(path, allow_pickle=False, **arrays)
      print(path, path.stat().st_size)
  return bool(stale)


def _differences(path: pathlib.Path, arrays: dict[str, np.ndarray]):
  """Yields the names of arrays that differ from those recorded."""
  with np.load(path) as recorded:
    yield from sorted(set(recorded) ^ set(arrays))
    for name in set(recorded) & set(arrays):
      old, new = recorded[name], arrays[name]
      if old.dtype.kind == "U":
        same = json.loads(str(old)) == json.loads(str(new))
      elif name.startswith("file"):  # torch writes an id of its own into each
        same = True
      else:
        same = old.shape == new.shape and np.allclose(old, new, atol=1e-5)
      if not same:
        yield name


def torch_file() -> dict[str, np.ndarray]:
  """Files of `torch.save`, as bytes, and the tensors in them."""
  base = torch.arange(24.0).reshape(2, 3, 4)
  tensors = {
    "view": base.transpose(0, 2)[1:],
    "bfloat16": torch.nn.Parameter(base.bfloat16()),
    "half": base.half(),
    "count": torch.arange(3),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0),
  }
  wrapped = {"generator": tensors, "step": 3, "size": torch.Size([1, 2])}
  code = {"generator": tensors, "hook": pathlib.PurePosixPath("a")}
  arrays = {k: v.detach().float().numpy() for k, v in tensors.items()}
  return arrays | {
    "file_new": _saved(wrapped),
    "file_with_code": _saved(code),
    "file_old": _saved(tensors, _use_new_zipfile_serialization=False),
  }


def _saved(content, **options) -> np.ndarray:
  file = io.BytesIO()
  torch.save(content, file, **options)
  return np.frombuffer(file.getvalue(), np.uint8)


def vae() -> dict[str, np.ndarray]:
  """Encodes and decodes one clip with a narrow autoencoder."""
  net = _with_weights(diffusers.AutoencoderKLWan(base_dim=4))
  video = _moved(wan_weights.uniform("video", (1, 9, 16, 24, 3)))
  latents = net.encode(video).latent_dist.mode()
  decoded = net.decode(
    _moved(wan_weights.normal("latents", (1, 3, 2, 3, 16)))
  ).sample
  full = _meta(lambda: diffusers.AutoencoderKLWan())
  return {
    "latents": _moved_back(latents),
    "decoded": _moved_back(decoded),
    "mean": np.array(net.config.latents_mean),
    "std": np.array(net.config.latents_std),
    "shapes": _json(_shapes(full)),
    "renamed": _json(
      _renamed(
        diffusers.loaders.single_file_utils.convert_wan_vae_to_diffusers,
        models.WAN_VAE,
      )
    ),
  }


TRANSFORMER = dict(
  num_attention_heads=2,
  attention_head_dim=16,
  in_channels=4,
  out_channels=4,
  text_dim=6,
  freq_dim=16,
  ffn_dim=48,
  num_layers=2,
)
IMAGE = dict(in_channels=10, image_dim=12, added_kv_proj_dim=32)


def transformer() -> dict[str, np.ndarray]:
  """Predicts one velocity with small text- and image-to-video networks."""
  wan = diffusers.WanTransformer3DModel
  net = _with_weights(wan(**TRANSFORMER))
  x = _moved(wan_weights.normal("x", (2, 3, 4, 6, 4)))
  t = torch.tensor([750.0, 20.0])
  text = torch.from_numpy(wan_weights.normal("text", (2, 512, 6)))
  of_text = net(x, t, text).sample
  net = _with_weights(wan(**(TRANSFORMER | IMAGE)))
  frames = _moved(wan_weights.normal("frames", (2, 3, 4, 6, 6)))
  image = torch.from_numpy(wan_weights.normal("image", (2, 5, 12)))
  of_image = net(torch.cat([x, frames], 1), t, text, image).sample
  convert = diffusers.loaders.single_file_utils
  convert = convert.convert_wan_transformer_to_diffusers
  full = {
    "1.3B": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14B": {},
    "14B_image": dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
  }
  configs = (models.WAN_1_3B, models.WAN_14B, models.WAN_14B_IMAGE)
  arrays = {"text": _moved_back(of_text), "image": _moved_back(of_image)}
  for (name, sizes), config in zip(full.items(), configs, strict=True):
    net = _meta(functools.partial(wan, **sizes))
    arrays[f"shapes_{name}"] = _json(_shapes(net))
    arrays[f"renamed_{name}"] = _json(_renamed(convert, config))
  return arrays


def text() -> dict[str, np.ndarray]:
  """Embeds two prompts with a small encoder."""
  sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2)
  small = transformers.UMT5Config(
    **sizes, num_heads=3, feed_forward_proj="gated-gelu"
  )
  net = _with_weights(transformers.UMT5EncoderModel(small))
  tokens = torch.tensor([[5, 6, 7, 39, 8, 1] * 30, [9, 1, *[0] * 178]])
  mask = (torch.arange(180) < torch.tensor([[180], [2]])).long()
  embeddings = net(tokens, mask).last_hidden_state
  attention = net.encoder.block[0].layer[0].SelfAttention
  far = torch.arange(-511, 512)
  full = transformers.UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24,
    num_heads=64, feed_forward_proj="gated-gelu",
  )  # fmt: skip
  net = _meta(lambda: transformers.UMT5EncoderModel(full))
  return {
    "tokens": tokens.numpy(),
    "mask": mask.bool().numpy(),
    "embeddings": embeddings.numpy(),
    "buckets": attention._relative_position_bucket(far).numpy(),
    "shapes": _json(_shapes(net)),
  }


def _renamed(convert, config) -> dict[str, str]:
  """Asks diffusers what it calls each key of the original."""
  (network,) = (n for n in _torch.NETWORKS if isinstance(config, n.config))
  originals = network.table(config, "wan")
  return {v: k for k, v in convert({k: k for k in originals}).items()}


def _with_weights(net: torch.nn.Module) -> torch.nn.Module:
  state = wan_weights.state_dict(_shapes(net))
  if "shared.weight" in state:  # one array under two names
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
  net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
  return net.eval()


def _shapes(net: torch.nn.Module) -> dict[str, list[int]]:
  return {key: list(value.shape) for key, value in net.state_dict().items()}


def _meta(build) -> torch.nn.Module:
  with torch.device("meta"):
    return build()


def _moved(a: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(a, -1, 1).copy())


def _moved_back(a: torch.Tensor) -> np.ndarray:
  return np.moveaxis(a.numpy(), 1, -1)


def _json(value) -> np.ndarray:
  return np.array(json.dumps(value))


RECORDINGS = {
  "torch_file": torch_file,
  "vae": vae,
  "transformer": transformer,
  "text": text,
}

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
