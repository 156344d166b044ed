"""Tiny random encoders of transformers, and ours with the same weights."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from vixml_jax.models.bert import BertEncoder
from vixml_jax.models.parameters import split_params
from vixml_jax.weights import hf_config, hf_folder, tables

VOCAB, LAYERS, DIM, HEADS, MLP, POSITIONS = 50, 3, 32, 4, 48, 24


def transformers_config(kind):
  """A small BertConfig or DistilBertConfig."""
  if kind == "bert":
    return transformers.BertConfig(
      vocab_size=VOCAB,
      num_hidden_layers=LAYERS,
      hidden_size=DIM,
      num_attention_heads=HEADS,
      intermediate_size=MLP,
      max_position_embeddings=POSITIONS,
    )
  return transformers.DistilBertConfig(
    vocab_size=VOCAB, n_layers=LAYERS, dim=DIM, n_heads=HEADS, hidden_dim=MLP, max_position_embeddings=POSITIONS
  )


def hf_encoder(kind, seed=0):
  """A BertModel or DistilBertModel whose parameters, norms and biases included, are all random."""
  config = transformers_config(kind)
  if kind == "bert":
    model = transformers.BertModel(config, add_pooling_layer=False)
  else:
    model = transformers.DistilBertModel(config)
  randomize(model, seed)
  return model.eval()


def randomize(model, seed):
  """Draws all parameters of a model of torch; the scales of norms are near 1."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_scale = "norm" in name.lower() and name.endswith("weight")
      parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)


def our_shapes(folder, **arguments):
  """Structure, shapes and axes of our encoder for the config in a folder."""
  arguments = hf_config.encoder_arguments(folder) | arguments
  return split_params(nnx.eval_shape(lambda: BertEncoder(**arguments, rngs=nnx.Rngs(0))))


def our_encoder(folder, **arguments):
  """Structure and loaded parameters of the encoder in a folder."""
  graphdef, shapes, _ = our_shapes(folder, **arguments)
  table = tables.TABLES[hf_config.read_config(folder)["model_type"]]
  return graphdef, hf_folder.load_pretrained(folder, table, shapes)


def texts(lengths, seed=0):
  """Random token ids, one array per text; without 0, the padding, whose gradient torch does not compute."""
  rng = np.random.default_rng(seed)
  return [rng.integers(1, VOCAB, length).astype(np.int32) for length in lengths]


def padded(rows):
  """Token ids and attention mask with one text per row, padded on the right."""
  width = max(map(len, rows))
  tokens = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
  return tokens, np.stack([np.arange(width) < len(row) for row in rows]).astype(np.int32)


def packed(rows_of_texts, width):
  """Tokens, segments and positions [R, T] of texts laid end to end."""
  shape = (len(rows_of_texts), width)
  tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  for row, row_texts in enumerate(rows_of_texts):
    start = 0
    for slot, text in enumerate(row_texts, 1):
      place = slice(start, start + len(text))
      tokens[row, place], segments[row, place] = text, slot
      positions[row, place] = np.arange(len(text))
      start += len(text)
  return tuple(map(jnp.asarray, (tokens, segments, positions)))


class Gradients:
  """Gradients of a torch model as the tensors of a checkpoint."""

  name = "gradients"

  def __init__(self, model):
    self._tensors = {
      name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()
    }

  def names(self):
    return list(self._tensors)

  def shape(self, name):
    return self._tensors[name].shape

  def read(self, name):
    return self._tensors[name]
