"""A tiny pretrained encoder and a miniature data set in a folder, configs cut down to them, and command lines."""

import importlib.util
from pathlib import Path
import sys

from ml_collections import ConfigDict
import torch
import transformers

from tests.helpers.forked_commands import ROOT, run_command
from tests.helpers.miniature import write_raw_folder, write_tokenizer

_TINY = dict(vocab_size=160, num_layers=2, embed_dim=32, mlp_dim=48)
TINY = _TINY | dict(num_heads=4, max_position=64)
TINY_DECODER = _TINY | dict(
  num_heads=8, num_kv_heads=2, head_dim=4, lora_rank=4, lora_alpha=4.0, param_dtype="bfloat16"
)


def load_config(name: str, variant: str | None = None) -> ConfigDict:
  """`configs/NAME.py:VARIANT`, as the command line reads it."""
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  spec = importlib.util.spec_from_file_location("config_under_test", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def write_encoder(folder: Path, encoder: ConfigDict) -> Path:
  """A random model of transformers that `config.encoder` fits, with the miniature's tokenizer; no download."""
  torch.manual_seed(0)
  make = _decoder if encoder.architecture == "decoder" else _bert
  make(encoder).save_pretrained(folder)
  write_tokenizer(folder)
  return folder


def _bert(encoder: ConfigDict) -> transformers.PreTrainedModel:
  if encoder.num_token_types == 0:
    return transformers.DistilBertModel(
      transformers.DistilBertConfig(
        vocab_size=encoder.vocab_size,
        n_layers=encoder.num_layers,
        dim=encoder.embed_dim,
        n_heads=encoder.num_heads,
        hidden_dim=encoder.mlp_dim,
        max_position_embeddings=encoder.max_position,
      )
    )
  return transformers.BertModel(
    transformers.BertConfig(
      vocab_size=encoder.vocab_size,
      num_hidden_layers=encoder.num_layers,
      hidden_size=encoder.embed_dim,
      num_attention_heads=encoder.num_heads,
      intermediate_size=encoder.mlp_dim,
      max_position_embeddings=encoder.max_position,
    ),
    add_pooling_layer=False,
  )


def _decoder(encoder: ConfigDict) -> transformers.PreTrainedModel:
  rope = {"rope_type": "default", "rope_theta": encoder.rope_theta}
  if len(encoder.rope_scaling):
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    kind = "linear" if len(encoder.rope_scaling) == 1 else "llama3"
    rope |= {"rope_type": kind} | dict(zip(keys, encoder.rope_scaling, strict=kind == "llama3"))
  kind = "Qwen3" if encoder.qk_norm else "Qwen2" if encoder.qkv_bias else "Llama"
  others = {}
  if encoder.zero_centered_norm:
    kind = "Gemma3Text"
    others = dict(
      layer_types=["sliding_attention", "full_attention"],
      sliding_window=encoder.window,
      query_pre_attn_scalar=encoder.head_dim,
    )
    rope = {
      "full_attention": rope,
      "sliding_attention": {"rope_type": "default", "rope_theta": encoder.local_rope_theta},
    }
  return getattr(transformers, f"{kind}Model")(
    getattr(transformers, f"{kind}Config")(
      vocab_size=encoder.vocab_size,
      num_hidden_layers=encoder.num_layers,
      hidden_size=encoder.embed_dim,
      num_attention_heads=encoder.num_heads,
      num_key_value_heads=encoder.num_kv_heads,
      head_dim=encoder.head_dim,
      intermediate_size=encoder.mlp_dim,
      rms_norm_eps=encoder.norm_eps,
      rope_parameters=rope,
      **others,
    )
  )


def shrink(config: ConfigDict, folder: Path, raw_dir: Path | str) -> ConfigDict:
  """The same recipe on the miniature: same keys, small sizes; encoder and data lie in `folder`."""
  if config.encoder.architecture == "decoder":
    config.encoder.update(TINY_DECODER)
    if (
      config.encoder.global_every > 1
    ):  # A local layer, with a window that items of 16 tokens exceed, and a global one.
      config.encoder.update(dict(global_every=2, window=8))
    config.prompt.eos = "[SEP]"  # The miniature's tokenizer knows few words; a phrase is three of its tokens.
    config.prompt.phrases.update(dict(T="file", I="map"))
  else:
    config.encoder.update(TINY)
  config.encoder.dtype = "float32"
  config.encoder.random_init = False
  config.encoder.pretrained = str(write_encoder(folder / "encoder", config.encoder))
  config.dataset.raw_dir = str(raw_dir)
  config.dataset.data_dir = str(folder / "data")
  config.dataset.max_length = 16
  config.prototype.update(dict(num_heads=4, mlp_dim=32))
  config.train.update(
    dict(
      batch_size=16,
      minutes=0.0,
      classifier_weight=0.0,
      free_vectors=8,
      row_length=32,
      chunk_rows=8,
      warmup_steps=2,
      learning_rate=1e-3,
      new_learning_rate=1e-3,
      free_vector_learning_rate=1e-3,
      log_every_steps=1,
    )
  )
  config.mining.update(dict(start_epoch=0, update_epochs=1, cluster_size=4, doubling_epochs=(1,)))
  config.eval.bootstrap_samples = 20
  return config


def miniature_config(folder: Path, encoder: str = "minilm-l6", **sizes) -> ConfigDict:
  """configs/custom.py with an encoder on a miniature written to `folder`."""
  config = shrink(load_config("custom", f"encoder={encoder}"), folder, write_raw_folder(folder / "raw", **sizes))
  config.train.epochs = 3
  return config


def run_commands(commands: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str]]:
  """Exit status, stdout and stderr of each `python -m vixml_jax.MODULE ARGUMENTS...`, given as [MODULE, *ARGUMENTS]."""
  finished = {name: run_command(command, folder) for name, command in commands.items()}
  return {name: (done.status, done.stdout, done.stderr) for name, done in finished.items()}
