"""A tiny random SigLIP vision tower of transformers, its tensors in the format of big_vision, and ours."""

import numpy as np
import transformers

from tests.helpers import tiny_encoders
from vixml_jax.models.vision import define_vision

# 30 = 3 * 8 + 6 has a remainder that is ignored, like 384 = 27 * 14 + 6. Three heads of eight.
ARGUMENTS = {
  "image_size": 30,
  "patch_size": 8,
  "num_layers": 3,
  "embed_dim": 24,
  "num_heads": 3,
  "mlp_dim": 40,
  "layer_norm_eps": 1e-6,
}


def _config_values():
  return dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=30, patch_size=8
  )


def hf_tower(seed=0):
  """A SiglipVisionModel whose parameters, norms and biases included, are all random."""
  model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_config_values()))
  tiny_encoders.randomize(model, seed)
  return model.eval()


def hf_towers(seed=0):
  """A SiglipModel: the vision tower of `hf_tower` and a text tower."""
  text = dict(vocab_size=20, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_config_values()))
  model.vision_model.load_state_dict(hf_tower(seed).state_dict())
  return model.eval()


def pixels(count=2, size=30, seed=0):
  """Images [count, size, size, 3] in -1..1."""
  return np.random.default_rng(seed).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def our_tower(**changes):
  """Structure of the tower of `hf_tower`, with some arguments changed."""
  return define_vision(ARGUMENTS | changes)[0]


def big_vision_tensors(model, stacked):
  """The tensors of a SiglipVisionModel under the names and in the shapes of big_vision's checkpoints.

  Transcribed from big_vision's models/vit.py and flax.linen's Conv, Dense and MultiHeadDotProductAttention.
  """
  theirs = {name: value.numpy() for name, value in model.state_dict().items()}
  dim, heads = model.config.hidden_size, model.config.num_attention_heads

  def norm(name):
    return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

  def dense(name):
    return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}

  def to_heads(weight, bias):
    return {"kernel": weight.T.reshape(dim, heads, dim // heads), "bias": bias.reshape(heads, dim // heads)}

  def from_heads(name):
    return {"kernel": theirs[f"{name}.weight"].T.reshape(heads, dim // heads, dim), "bias": theirs[f"{name}.bias"]}

  def block(i):
    name = f"encoder.layers.{i}"
    attention = {
      full: to_heads(theirs[f"{name}.self_attn.{letter}_proj.weight"], theirs[f"{name}.self_attn.{letter}_proj.bias"])
      for letter, full in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    return {
      "LayerNorm_0": norm(f"{name}.layer_norm1"),
      "LayerNorm_1": norm(f"{name}.layer_norm2"),
      "MultiHeadDotProductAttention_0": attention | {"out": from_heads(f"{name}.self_attn.out_proj")},
      "MlpBlock_0": {"Dense_0": dense(f"{name}.mlp.fc1"), "Dense_1": dense(f"{name}.mlp.fc2")},
    }

  weights = np.split(theirs["head.attention.in_proj_weight"], 3)
  biases = np.split(theirs["head.attention.in_proj_bias"], 3)
  pool = {name: to_heads(*pair) for name, *pair in zip(("query", "key", "value"), weights, biases, strict=True)}
  blocks = [_joined(block(i)) for i in range(model.config.num_hidden_layers)]
  layers = (
    {f"encoderblock/{name}": np.stack([each[name] for each in blocks]) for name in blocks[0]}
    if stacked
    else {f"encoderblock_{i}/{name}": value for i, each in enumerate(blocks) for name, value in each.items()}
  )
  return _joined(
    {
      "embedding": {
        "kernel": theirs["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "bias": theirs["embeddings.patch_embedding.bias"],
      },
      "pos_embedding": theirs["embeddings.position_embedding.weight"][None],
      "Transformer": layers | {"encoder_norm": norm("post_layernorm")},
      "MAPHead_0": {
        "probe": theirs["head.probe"],
        "LayerNorm_0": norm("head.layernorm"),
        "MultiHeadDotProductAttention_0": pool | {"out": from_heads("head.attention.out_proj")},
        "MlpBlock_0": {"Dense_0": dense("head.mlp.fc1"), "Dense_1": dense("head.mlp.fc2")},
      },
    }
  )


def _joined(tree, prefix=""):
  joined = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    joined |= _joined(value, f"{name}/") if isinstance(value, dict) else {name: value}
  return joined
