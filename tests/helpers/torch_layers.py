"""Copies the weights of torch's transformer layer to ours."""

import jax.numpy as jnp
import numpy as np
import torch

from vixml_jax.models.transformer import PostNormLayer


def torch_layer(dim: int, heads: int, mlp: int) -> torch.nn.TransformerEncoderLayer:
  """Returns a post-norm layer with random weights, biases and norms, in evaluation mode."""
  torch.manual_seed(0)
  layer = torch.nn.TransformerEncoderLayer(dim, heads, mlp, activation="gelu", batch_first=True, norm_first=False)
  with torch.no_grad():
    for name, parameter in layer.named_parameters():
      parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
  return layer.eval()


def copy_torch_layer(theirs: torch.nn.TransformerEncoderLayer, ours: PostNormLayer) -> None:
  """Gives our layer the weights of torch's."""
  weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
  heads, head_dim = ours.attention.query.bias.shape
  dim = heads * head_dim
  kernels, biases = (np.split(weights[f"self_attn.in_proj_{name}"], 3) for name in ("weight", "bias"))
  for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
    linear = getattr(ours.attention, name)
    linear.kernel.set_value(jnp.asarray(kernel.T.reshape(dim, heads, head_dim)))
    linear.bias.set_value(jnp.asarray(bias.reshape(heads, head_dim)))
  out = weights["self_attn.out_proj.weight"].T.reshape(heads, head_dim, dim)
  ours.attention.output.kernel.set_value(jnp.asarray(out))
  ours.attention.output.bias.set_value(jnp.asarray(weights["self_attn.out_proj.bias"]))
  for module, name in ((ours.up, "linear1"), (ours.down, "linear2")):
    module.kernel.set_value(jnp.asarray(weights[f"{name}.weight"].T))
    module.bias.set_value(jnp.asarray(weights[f"{name}.bias"]))
  for module, name in ((ours.attention_norm, "norm1"), (ours.mlp_norm, "norm2")):
    module.scale.set_value(jnp.asarray(weights[f"{name}.weight"]))
    module.bias.set_value(jnp.asarray(weights[f"{name}.bias"]))
