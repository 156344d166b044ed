"""Workdirs with tiny encoders whose weights are random: what export and inference need, without training."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from tests.helpers import tiny_decoders, tiny_encoders
from tests.helpers.miniature_runs import load_config, shrink, write_encoder
from tests.helpers.tiny_tokenizers import END_OF_TEXT, write_byte_bpe
from vixml_jax.exporting import export
from vixml_jax.files import sha256_of_file
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer, provenance
from vixml_jax.run.from_config import model_from_config
from vixml_jax.run.state import TrainState
from vixml_jax.weights import source


def tiny_config(folder, encoder):
  """Returns a config whose encoder and tokenizer are in `folder`, for texts of at most 16 tokens and early fusion."""
  encoder, _, images = encoder.partition(",images=")
  config = shrink(load_config("custom", f"encoder={encoder},images={images or 0}"), folder, folder)
  config.features.dim = 6
  if encoder == "qwen3-0.6b":  # Trained without adapters, bidirectional, and pooled at the final eos.
    config.encoder.update(dict(lora_rank=0, param_dtype="float32", bidirectional=True, pooling="last"))
  if encoder == "gemma-3-270m":  # Its items are longer than the window.
    config.encoder.bidirectional = True
  if encoder == "llama-3.2-1b":  # This tokenizer puts a token before every text.
    config.encoder.vocab_size = 400
    config.prompt.eos = END_OF_TEXT
    shutil.rmtree(config.encoder.pretrained)
    write_encoder(folder / "encoder", config.encoder)
    write_byte_bpe(folder / "encoder", begin="<begin>")
  base = transformers.AutoModel.from_pretrained(config.encoder.pretrained)
  tiny_encoders.randomize(base, 3)
  if encoder == "gemma-3-4b":
    base = tiny_decoders.with_image_tower(base)
  base.save_pretrained(config.encoder.pretrained)
  return config


def write_workdir(folder, config):
  """Writes what training writes, with random values for the trained parameters."""
  folder.mkdir()
  config.train.free_vectors = 8
  configuration.write(config, folder / "config.json")
  definition = model_from_config(config)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(1 + 0.1 * noise if path[-1].key == "scale" else 0.2 * noise, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(draw, definition.split(definition.shapes)[0])
  one = jnp.zeros(1)
  meta = provenance("data", source.weight_hashes(config.encoder.pretrained)) | {"config": config.to_dict()}
  with Checkpointer(folder / "checkpoints", 1) as checkpointer:
    checkpointer.save(5, Checkpoint(TrainState(one, params, one, one, jnp.zeros((24, 32)), jnp.zeros(24)), None, meta))
  shutil.copytree(config.encoder.pretrained, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
  write_info(folder)
  return folder


def write_info(workdir):
  hashes = {path.name: sha256_of_file(path) for path in (workdir / "tokenizer").iterdir()}
  (workdir / "inference.json").write_text(json.dumps({"tokenizer_sha256": hashes, "image_features": None}))


def exported(workdir, kind, folder, **options):
  export.export(workdir, kind, folder, **options)
  return folder
