"""Small sizes for configs: the same recipe and variants in seconds. It imports little, since configs import it."""

from collections.abc import Callable
from pathlib import Path
import sys

from ml_collections import ConfigDict

# Wide enough for the prefixes of embeddings that pages ask for.
_BERT = dict(vocab_size=160, num_layers=1, embed_dim=384, num_heads=12, mlp_dim=48, max_position=64)
_DECODER = dict(vocab_size=160, num_layers=1, embed_dim=32, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=48)
ENCODERS = ("minilm-l6", "distilbert", "qwen2.5-tiny", "qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b")
"""Encoders that pages train."""


def shrunk(get_config: Callable[[str | None], ConfigDict]) -> Callable[[str | None], ConfigDict]:
  """Returns a function like `get_config` whose configs are small, except to describe, compile or launch."""

  def get(variant: str | None = None) -> ConfigDict:
    config = get_config(variant)
    if Path(sys.argv[0]).stem not in ("describe", "aot_compile", "read_config"):
      _shrink(config)
    return config

  return get


def _shrink(config: ConfigDict) -> None:
  encoder = config.encoder
  decoder = encoder.architecture == "decoder"
  name = f"{encoder.num_layers}x{encoder.embed_dim}"
  if decoder:
    config.encoder.update(_DECODER)
    if encoder.lora_rank:
      config.encoder.update(dict(lora_rank=4, lora_alpha=4.0))
    # The miniature's tokenizer has few words; others are spelled.
    config.prompt.eos = "[SEP]"
    config.prompt.phrases.update(dict(T="file", I="map", T2="pen"))
  else:
    config.encoder.update(_BERT)
  config.encoder.dtype = "float32"
  config.encoder.pretrained = f"encoders/{name}"
  config.prototype.update(dict(num_heads=4, mlp_dim=32))
  config.train.update(
    dict(
      epochs=min(config.train.epochs, 1), batch_size=32, chunk_rows=8, free_vectors=8, warmup_steps=1, log_every_steps=1
    )
  )
  config.mining.update(dict(start_epoch=0, update_epochs=1, cluster_size=4, doubling_epochs=()))
  config.eval.bootstrap_samples = 20
  config.checkpoint.every_steps = 1000
  if config.dataset.validation_fraction:
    config.dataset.validation_fraction = 0.2
