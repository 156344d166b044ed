"""A tiny pretrained encoder and a miniature data set in a folder, configs cut down to them, and command lines."""

import importlib.util
import json
from pathlib import Path
import subprocess
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


# Starts each command as `python -m` does, in a fork of one process that has done the slow imports.
_SERVER = """
import json, os, runpy, sys
import vixml_jax.training.run, ml_collections.config_flags

results = {}
for name, (module, *arguments) in json.load(sys.stdin).items():
  child = os.fork()
  if not child:
    for number in (1, 2):
      os.dup2(os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [module, *arguments]
    status = 99  # The module came back instead of exiting.
    try:
      runpy.run_module(f"vixml_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      status = stop.code
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status or 0)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  results[name] = status, *(open(f"{sys.argv[1]}/{number}").read() for number in (1, 2))
json.dump(results, sys.stdout)
"""


def run_commands(commands: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str]]:
  """Exit status, stdout and stderr of each `python -m vixml_jax.MODULE ARGUMENTS...`, given as [MODULE, *ARGUMENTS]."""
  done = subprocess.run(
      [sys.executable, "-W", "ignore", "-c", _SERVER, folder], input=json.dumps(commands), cwd=ROOT, text=True,
      capture_output=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)
