"""A tiny pretrained encoder and a miniature data set in a folder, and configs cut down to them."""

import importlib.util
from pathlib import Path
import sys

from ml_collections import ConfigDict
import torch
import transformers

from tests.miniature import write_raw_folder, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(vocab_size=160, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_position=64)


def load_config(name: str, variant: str | None = None) -> ConfigDict:
  """`configs/NAME.py:VARIANT`, as the command line reads it."""
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  spec = importlib.util.spec_from_file_location("config_under_test", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def write_encoder(folder: Path, kind: str = "bert") -> Path:
  """A random BERT or DistilBERT of transformers with the miniature's tokenizer; no download."""
  torch.manual_seed(0)
  if kind == "bert":
    config = transformers.BertConfig(
        vocab_size=TINY["vocab_size"], num_hidden_layers=TINY["num_layers"], hidden_size=TINY["embed_dim"],
        num_attention_heads=TINY["num_heads"], intermediate_size=TINY["mlp_dim"],
        max_position_embeddings=TINY["max_position"])
    model = transformers.BertModel(config, add_pooling_layer=False)
  else:
    config = transformers.DistilBertConfig(
        vocab_size=TINY["vocab_size"], n_layers=TINY["num_layers"], dim=TINY["embed_dim"],
        n_heads=TINY["num_heads"], hidden_dim=TINY["mlp_dim"], max_position_embeddings=TINY["max_position"])
    model = transformers.DistilBertModel(config)
  model.save_pretrained(folder)
  write_tokenizer(folder)
  return folder


def shrink(config: ConfigDict, encoder_folder: Path, raw_dir: Path | str, data_dir: Path) -> ConfigDict:
  """The same recipe on the miniature: same keys, small sizes."""
  config.encoder.update(TINY)
  config.encoder.pretrained = str(encoder_folder)
  config.encoder.dtype = "float32"
  config.dataset.raw_dir = str(raw_dir)
  config.dataset.data_dir = str(data_dir)
  config.dataset.max_length = 16
  config.prototype.update(dict(num_heads=4, mlp_dim=32))
  config.train.update(dict(batch_size=16, free_vectors=8, row_length=32, chunk_rows=8, warmup_steps=2,
                           learning_rate=1e-3, new_learning_rate=1e-3, free_vector_learning_rate=1e-3,
                           log_every_steps=1))
  config.mining.update(dict(start_epoch=0, update_epochs=1, cluster_size=4, doubling_epochs=(1,)))
  config.eval.bootstrap_samples = 20
  return config


def miniature_config(folder: Path, **sizes) -> ConfigDict:
  """configs/custom.py on a miniature written to `folder`."""
  encoder = write_encoder(folder / "encoder")
  raw = write_raw_folder(folder / "raw", **sizes)
  config = shrink(load_config("custom"), encoder, raw, folder / "data")
  config.train.epochs = 3
  return config
