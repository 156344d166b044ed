"""Sides in PyTorch for rows with text encoders: padded as in the paper's code, and without padding.

The model, loss and optimizer are those of `benchmarks.torch_reference`; the encoders are those of transformers and
peft, with the parameters of our side.
"""

import contextlib
from pathlib import Path
import tempfile
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen
import transformers

from benchmarks import torch_reference
from benchmarks.bench import text_models
from benchmarks.bench.text_models import TextModel, TrainingData
from benchmarks.bench.torch_device import device, synchronize
from vixml_jax.input.packing import PackedItems
from vixml_jax.losses import LossConfig
from vixml_jax.models.lora import split_lora
from vixml_jax.ragged import Ragged
from vixml_jax.weights import engine, tables
from vixml_jax.weights.hf_config import config_of
from vixml_jax.weights.peft import save_adapter

_VARLEN = "bench_varlen"
_LOSS = LossConfig()


def to_torch(array: np.ndarray) -> Tensor:
  """Returns a copy of an array, which may be bfloat16, on the device."""
  if array.dtype.name == "bfloat16":
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device())
  return torch.from_numpy(np.array(array)).to(device())


def make_encoder(model: TextModel, attention: str = "sdpa") -> torch.nn.Module:
  """Returns the encoder of transformers with our parameters, and with adapters of peft if ours has some.

  Args:
    model: Our side's model.
    attention: Implementation of the attention, as transformers names it.
  """
  config = config_of(model.encoder)
  table = tables.TABLES[config["model_type"]]
  base, adapters = split_lora(jax.device_get(model.params["encoder"]))
  kind = {"bert": "BertModel", "qwen2": "Qwen2Model"}[config["model_type"]]
  settings = transformers.AutoConfig.for_model(**config)
  settings._attn_implementation = attention
  options = {"add_pooling_layer": False} if kind == "BertModel" else {}
  with torch.device(device()):
    encoder = getattr(transformers, kind)(settings, **options)
  if model.encoder.get("param_dtype", "float32") != "float32":
    encoder = encoder.to(getattr(torch, model.encoder["param_dtype"]))
  missing, unexpected = encoder.load_state_dict(
    {name: to_torch(value) for name, value in engine.invert(table, base).items()}, strict=False
  )
  if unexpected or [name for name in missing if "position_ids" not in name]:
    raise ValueError(f"the parameters do not fit {kind}: missing {missing}, unexpected {unexpected}")
  return _with_adapters(encoder, adapters, model.encoder["lora_alpha"]) if adapters else encoder


def _with_adapters(encoder: torch.nn.Module, adapters: Any, alpha: float) -> torch.nn.Module:
  import peft

  with tempfile.TemporaryDirectory() as folder:
    save_adapter(adapters, Path(folder), "base", alpha)
    return peft.PeftModel.from_pretrained(encoder, folder, is_trainable=True)


def pad(tokens: Ragged) -> tuple[Tensor, Tensor]:
  """Returns token ids padded to the longest text, int64 [rows, longest], and which exist, bool."""
  mask = np.arange(tokens.lengths.max()) < tokens.lengths[:, None]
  ids = np.zeros(mask.shape, np.int64)
  ids[mask] = tokens.values
  return torch.from_numpy(ids), torch.from_numpy(mask)


class PaddedEncoder(torch.nn.Module):
  """Pools texts that are padded to the longest one of the queries, or of the labels."""

  def __init__(self, model: TextModel):
    super().__init__()
    self.encoder = make_encoder(model)

  def pooled(self, data: TrainingData, number: int) -> list[Tensor]:
    """Returns the pooled outputs of the queries and of the labels of a batch, [B, D] each."""
    return [self._pool(*pad(tokens)) for tokens in data.tokens(number)]

  def _pool(self, ids: Tensor, mask: Tensor) -> Tensor:
    ids, mask = ids.to(device()), mask.to(device())
    hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
    counted = mask.unsqueeze(-1).float()
    return (hidden * counted).sum(dim=1) / counted.sum(dim=1)


class PackedEncoder(torch.nn.Module):
  """Pools texts in the rows that our side packs, with SDPA under a block-diagonal mask, compiled by `torch.compile`."""

  def __init__(self, model: TextModel, compiled: bool = True):
    super().__init__()
    self.encoder = make_encoder(model)
    self._causal = model.architecture == "decoder" and not model.encoder["bidirectional"]
    self._run = torch.compile(self.encoder, dynamic=False) if compiled else self.encoder

  def pooled(self, data: TrainingData, number: int) -> list[Tensor]:
    """Returns the pooled outputs of the queries and of the labels of a batch, [B, D] each."""
    return list(self.pool(data.batch(number).items, data.layout.slots).chunk(2))

  def pool_by_chunk(self, items: PackedItems, slots: int) -> Tensor:
    """Returns what `pool` does, one chunk of rows after another."""
    names = ("tokens", "segments", "positions")
    means = [
      self._slot_means(*(getattr(items, name)[chunk] for name in names), slots) for chunk in range(len(items.tokens))
    ]
    return torch.cat(means)[to_torch(items.slots).long()]

  def pool(self, items: PackedItems, slots: int) -> Tensor:
    """Returns the pooled outputs of packed items [items, D], all rows at once."""
    rows = (array.reshape(-1, array.shape[-1]) for array in (items.tokens, items.segments, items.positions))
    return self._slot_means(*rows, slots)[to_torch(items.slots).long()]

  def _slot_means(self, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray, slots: int) -> Tensor:
    """Returns the pooled outputs of all slots of rows [rows * slots, D]."""
    slot_of = to_torch(segments).long()
    mask = slot_of[:, None, :, None] == slot_of[:, None, None, :]
    if self._causal:
      mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    hidden = self._run(
      input_ids=to_torch(tokens).long(), attention_mask=mask, position_ids=to_torch(positions).long()
    ).last_hidden_state.float()
    # Padding, which has slot 0, is pooled as well and then left out.
    places = torch.arange(len(slot_of), device=slot_of.device)[:, None] * (slots + 1) + slot_of
    means = _means(hidden.flatten(0, 1), places.flatten(), len(slot_of) * (slots + 1))
    return means.unflatten(0, (-1, slots + 1))[:, 1:].flatten(0, 1)


class FlatEncoder(torch.nn.Module):
  """Pools texts that follow each other in one row without padding, with the flash attention of torch (`varlen_attn`).

  Attention probabilities are not dropped: `varlen_attn` cannot. On a CPU, which has no such kernel, attention is
  computed text by text; that is for tests.
  """

  def __init__(self, model: TextModel):
    super().__init__()
    transformers.AttentionInterface.register(_VARLEN, _varlen_attention)
    self.encoder = make_encoder(model, _VARLEN)

  def pooled(self, data: TrainingData, number: int) -> list[Tensor]:
    """Returns the pooled outputs of the queries and of the labels of a batch, [B, D] each."""
    queries, labels = data.tokens(number)
    tokens = queries.followed_by(labels)
    lengths, offsets = to_torch(tokens.lengths), to_torch(tokens.offsets)
    positions = torch.arange(len(tokens.values), device=device()) - torch.repeat_interleave(offsets[:-1], lengths)
    hidden = (
      self.encoder(
        input_ids=to_torch(tokens.values).long()[None],
        position_ids=positions[None],
        bench_offsets=offsets.int(),
        bench_longest=int(tokens.lengths.max()),
      )
      .last_hidden_state[0]
      .float()
    )
    items = torch.repeat_interleave(torch.arange(len(tokens), device=device()), lengths)
    return list(_means(hidden, items, len(tokens)).chunk(2))


def _varlen_attention(
  module: torch.nn.Module,
  query: Tensor,
  key: Tensor,
  value: Tensor,
  attention_mask: Tensor | None,
  scaling: float | None = None,
  bench_offsets: Tensor | None = None,
  bench_longest: int = 0,
  **_: Any,
) -> tuple[Tensor, None]:
  """Computes attention within texts; the interface is that of transformers, with heads [1, H, T, head_dim]."""
  assert bench_offsets is not None
  causal = bool(getattr(module, "is_causal", False))
  return flat_attention(query[0], key[0], value[0], bench_offsets, bench_longest, causal, scaling)[None], None


def flat_attention(
  query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, causal: bool, scaling: float | None = None
) -> Tensor:
  """Returns attention within texts that follow each other, [T, H, head_dim].

  Args:
    query: [H, T, head_dim].
    key: [G, T, head_dim], each head of which serves H / G heads of the queries.
    value: As `key`.
    offsets: First token of each text and the end of the last, int32 [texts + 1].
    longest: Most tokens of a text.
    causal: Whether a token attends to itself and earlier tokens only.
    scaling: Factor of the scores; None for that of the width of a head.
  """
  if query.is_cuda:
    query, key, value = (x.transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    window, grouped = (-1, 0) if causal else (-1, -1), query.shape[1] != key.shape[1]
    return varlen.varlen_attn(
      query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
  parts = [
    functional.scaled_dot_product_attention(
      *(x[None, :, start:end] for x in (query, key, value)), is_causal=causal, scale=scaling, enable_gqa=True
    )[0]
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
  ]
  return torch.cat(parts, dim=1).transpose(0, 1)


def _means(hidden: Tensor, items: Tensor, count: int) -> Tensor:
  """Returns the mean of the hidden states [T, D] of each item, [count, D]; zeros for an item without any."""
  sums = hidden.new_zeros(count, hidden.shape[1]).index_add(0, items, hidden)
  return sums / torch.bincount(items, minlength=count).clamp(min=1)[:, None]


class TorchTrainingStep:
  """The training step of the paper's loss around one of the encoders above.

  Attributes:
    loss: Loss of the first batch without dropout, at the initial parameters.
  """

  def __init__(self, encoder: PaddedEncoder | PackedEncoder | FlatEncoder, model: TextModel, data: TrainingData):
    torch.manual_seed(0)
    prototype = model.definition().bind(model.params).prototype
    assert prototype is not None
    self._encoder, self._data = encoder, data
    layer = model.definition().shapes["prototype"]["layer"]
    heads, width = layer["attention"]["query"]["kernel"].shape[1], layer["up"]["kernel"].shape[1]
    self._model = torch_reference.ReferenceModel(encoder.encoder, 1, model.free_vectors, heads, width, 0.1)
    torch_reference.copy_new_parameters(
      jax.device_get({k: v for k, v in model.params.items() if k != "encoder"}), self._model
    )
    self._model.to(device())
    self._optimizer, self._schedule = torch_reference.make_optimizer(
      self._model, **text_models.LEARNING_RATES, **text_models.SCHEDULE
    )
    dtype = model.encoder["dtype"]
    self._autocast = (
      torch.autocast(device().type, getattr(torch, dtype)) if dtype != "float32" else contextlib.nullcontext()
    )
    self._model.eval()
    with torch.no_grad():
      drawn = [to_torch(rows).long() for rows in text_models.drawn_positives(data)]
      self.loss = float(self._loss(0, drawn))
    self._model.train()

  def step(self, number: int) -> float:
    """Trains on the batch of a round and returns its loss."""
    loss = self._loss(number, None)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._optimizer.step()
    self._schedule.step()
    synchronize()
    return float(loss.detach())

  def _loss(self, number: int, drawn: list[Tensor] | None) -> Tensor:
    """Returns the loss of a batch; the positives of its terms are drawn at random if they are not given."""
    positives = torch.from_numpy(self._data.batch(number).positives).to(device())
    with self._autocast:
      queries, labels = self._encoder.pooled(self._data, number)
    clusters = torch.zeros(len(labels), dtype=torch.long, device=device())
    prototypes = self._model.prototypes(labels, clusters, torch.zeros_like(labels))
    if drawn is None:
      rows = (positives, positives, positives.T, positives)
      drawn = [torch.multinomial(which.float(), 1)[:, 0] for which in rows]
    queries, labels = (functional.normalize(x, dim=1) for x in (queries, labels))
    return torch_reference.prime_loss(queries, labels, prototypes, positives, drawn, _LOSS)["loss"]
