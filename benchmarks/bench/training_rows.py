"""Rows of training: a step of PRIME with an encoder or with adapters of a decoder, and a step with GradCache."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.bench.data import OF_NAMES, TOKENIZER_PACKAGE, write_bert
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, UnavailableError, Work
from benchmarks.bench.text_models import OurTraining, TextModel, TrainingData
from vixml_jax.losses import LossConfig
from vixml_jax.models.dual_encoder import l2_normalize
from vixml_jax.training.step import StepConfig, device_batch, encode_batch

_TORCH = ("torch", "transformers")
# Largest relative difference of losses that rounding explains, by dtype.
_TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2}


def training(size: str) -> Work:
  """One training step of PRIME with an encoder: forward, backward, AdamW, with dropout."""
  model, batch, row_length = {
    "tiny": (TextModel.of("tiny-bert", dtype="float32"), 8, 64),
    "cpu": (TextModel.of("minilm-l6", dtype="float32"), 128, 64),
    "gpu": (TextModel.of("bert", dtype="bfloat16"), 512, 128),
  }[size]
  return _training(model, TrainingData.make(model.encoder["vocab_size"], batch, row_length), size, _TORCH)


def training_names(size: str) -> Work:
  """The same with texts of about four tokens, as names of icons or tags have."""
  model, batch, row_length = {
    "tiny": (TextModel.of("tiny-bert", dtype="float32"), 8, 32),
    "cpu": (TextModel.of("minilm-l6", dtype="float32"), 512, 48),
    "gpu": (TextModel.of("bert", dtype="bfloat16"), 2048, 128),
  }[size]
  data = TrainingData.make(model.encoder["vocab_size"], batch, row_length, mean=OF_NAMES)
  return _training(model, data, size, _TORCH)


def lora(size: str) -> Work:
  """One training step of the adapters of a decoder of the shape of Qwen2.5."""
  model, batch, row_length = {
    "tiny": (_adapted("tiny-decoder", 4, "float32"), 4, 64),
    "cpu": (_adapted("qwen2.5-tiny", 16, "float32"), 64, 64),
    "gpu": (_adapted("qwen2.5-0.5b", 256, "bfloat16"), 256, 128),
  }[size]
  return _training(model, TrainingData.make(model.encoder["vocab_size"], batch, row_length), size, (*_TORCH, "peft"))


def lora_3b(size: str) -> Work:
  """One training step of the adapters of Qwen2.5-3B on a GPU; at other sizes the row `lora`."""
  if size != "gpu":
    return lora(size)
  model = _adapted("qwen2.5-3b", 256, "bfloat16")
  return _training(model, TrainingData.make(model.encoder["vocab_size"], 64, 128), size, (*_TORCH, "peft"))


def _adapted(name: str, rank: int, dtype: str) -> TextModel:
  return TextModel.of(name, lora_rank=rank, lora_alpha=float(rank), dtype=dtype, param_dtype=dtype)


def _training(model: TextModel, data: TrainingData, size: str, packages: tuple[str, ...]) -> Work:
  def ours() -> Started:
    side = OurTraining(model, data)
    return Started(side.step, side.loss)

  def torch_side(kind: str) -> Started:
    from benchmarks.bench import torch_models

    if kind == "FlatEncoder" and size == "cpu":
      raise UnavailableError("flash attention of torch needs a GPU")
    options = {"compiled": size != "tiny"} if kind == "PackedEncoder" else {}
    side = torch_models.TorchTrainingStep(getattr(torch_models, kind)(model, **options), model, data)
    return Started(side.step, side.loss)

  encoder, lengths = model.encoder, data.lengths()
  names = {
    "torch, transformers, padded" if "peft" not in packages else "torch, transformers, peft, padded": "PaddedEncoder",
    "torch, packed, SDPA, compiled": "PackedEncoder",
    "torch, unpadded, flash attention": "FlatEncoder",
  }
  return Work(
    what=(
      f"a step on {len(lengths) // 2} queries and as many labels, {int(lengths.sum()):,} tokens, {encoder['dtype']}; "
      f"{encoder['num_layers']} layers of width {encoder['embed_dim']}"
      + (f", adapters of rank {encoder['lora_rank']}" if encoder.get("lora_rank") else "")
      + "; the losses of the first batch without dropout are compared"
    ),
    unit="tokens",
    units=float(lengths.sum()),
    sides=[
      Side(OURS, ours),
      *(Side(name, functools.partial(torch_side, kind), packages) for name, kind in names.items()),
    ],
    check=_same_loss(encoder["dtype"]),
    cost=Cost("flops", model.training_flops(lengths), encoder["dtype"]),
  )


def _same_loss(dtype: str) -> Callable[[float, float], Check]:
  def check(ours: float, theirs: float) -> Check:
    difference = abs(ours - theirs) / abs(ours)
    return Check(difference <= _TOLERANCE[dtype], f"loss {theirs:.5f}, ours {ours:.5f}")

  return check


def gradcache(size: str) -> Work:
  """One step with in-batch negatives of a large batch in small chunks, as GradCache does."""
  model, batch, chunk, row_length = {
    "tiny": (TextModel.of("tiny-bert", vocab_size=30522, dtype="float32"), 16, 4, 64),
    "cpu": (TextModel.of("minilm-l6", dtype="float32"), 256, 32, 64),
    "gpu": (TextModel.of("minilm-l6", dtype="bfloat16"), 4096, 512, 128),
  }[size]
  model = TextModel(model.encoder | dict(dropout=0.0, attention_dropout=0.0, projection_dropout=0.0), "bert", "mean")
  data = TrainingData.make(model.encoder["vocab_size"], batch, row_length, 2 * chunk * 16 // row_length, positives=1)
  lengths, dtype = data.lengths(), model.encoder["dtype"]
  return Work(
    what=(
      f"a step on {batch:,} pairs of texts, {int(lengths.sum()):,} tokens, {dtype}, without dropout, about {chunk} "
      f"pairs at a time; {model.encoder['num_layers']} layers of width {model.encoder['embed_dim']}; the losses of "
      "the first two steps are compared"
    ),
    unit="pairs",
    units=batch,
    sides=[
      Side(OURS, lambda: _with_two_losses(_our_gradcache(model, data)), (TOKENIZER_PACKAGE,)),
      Side(
        "sentence-transformers, CachedMNRL",
        lambda: _with_two_losses(_sentence_transformers_gradcache(model, data, chunk)),
        (*_TORCH, "sentence-transformers", TOKENIZER_PACKAGE),
      ),
    ],
    check=_same_losses(dtype),
    # The forward pass runs twice.
    cost=Cost("flops", model.training_flops(lengths) + model.forward_flops(lengths), dtype),
  )


_SCALE, _RATE, _EPS = 20.0, 1e-4, 1e-8


def _with_two_losses(step: Callable[[int], float]) -> Started:
  return Started(step, [step(0), step(1)])


def _same_losses(dtype: str) -> Callable[[list[float], list[float]], Check]:
  def check(ours: list[float], theirs: list[float]) -> Check:
    same = all(_same_loss(dtype)(*pair).same for pair in zip(ours, theirs, strict=True))
    return Check(same, f"loss {theirs[1]:.5f}, ours {ours[1]:.5f}")

  return check


def _our_gradcache(model: TextModel, data: TrainingData) -> Callable[[int], float]:
  definition, optimizer, mesh = model.definition(), optax.adamw(_RATE, eps=_EPS, weight_decay=0.0), model.mesh
  config = StepConfig(definition, optimizer, data.layout, LossConfig(), 0, "threefry2x32", remat=True)
  # The encoder alone is trained; the other parameters get gradients of zero.
  params = jax.tree.map(jnp.copy, model.params)
  state = {"params": params, "opt_state": jax.jit(optimizer.init)(params)}

  @functools.partial(jax.jit, donate_argnames=("params", "opt_state"))
  def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    def loss_of(params: Any) -> jax.Array:
      queries, labels = jnp.split(l2_normalize(encode_batch(config, mesh, params, batch, None)), 2)
      scores = _SCALE * jnp.matmul(queries, labels.T, precision=jax.lax.Precision.HIGHEST)
      return optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(scores))).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  def call(number: int) -> float:
    state["params"], state["opt_state"], loss = step(**state, batch=device_batch(data.batch(number), None, mesh))
    return float(jax.block_until_ready(loss))

  return call


def _sentence_transformers_gradcache(model: TextModel, data: TrainingData, chunk: int) -> Callable[[int], float]:
  from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
  import torch

  from benchmarks.bench.encoding_rows import sentence_transformer
  from benchmarks.bench.torch_device import device, synchronize
  from benchmarks.bench.torch_models import pad

  encoder = sentence_transformer(write_bert(model.encoder, model.params["encoder"])).to(device()).train()
  loss_of = CachedMultipleNegativesRankingLoss(encoder, scale=_SCALE, mini_batch_size=chunk)
  optimizer = torch.optim.AdamW(encoder.parameters(), lr=_RATE, eps=_EPS, weight_decay=0.0)
  dtype = model.encoder["dtype"]

  def call(number: int) -> float:
    features = []
    for tokens in data.tokens(number):
      ids, mask = pad(tokens)
      features.append({"input_ids": ids.to(device()), "attention_mask": mask.long().to(device())})
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device().type, getattr(torch, dtype), enabled=dtype != "float32"):
      loss = loss_of(features, None)
    loss.backward()
    optimizer.step()
    synchronize()
    return float(loss.detach())

  return call
