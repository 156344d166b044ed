"""Tiny random decoders of transformers, ours with the same weights, and the sizes of published decoders."""

import warnings

from flax import nnx
import jax.numpy as jnp
import peft
import torch
import transformers

from configs.encoders import ENCODERS
from tests.helpers import tiny_encoders
from vixml_jax.models.decoder import Decoder
from vixml_jax.models.parameters import split_params
from vixml_jax.weights import engine, hf_config, hf_folder, tables

KINDS = ("qwen2", "qwen3", "llama", "gemma3_text")
VOCAB, LAYERS, DIM, HEADS, KV_HEADS, MLP = tiny_encoders.VOCAB, 3, 32, 4, 2, 48

# Over 64 positions, the pairs of a head of 8 turn 10.2, 1.02, 0.1 and 0.01 times. With the bounds 0.5 and 4, one is
# unchanged, one is interpolated and two are slowed down.
ROPE_SCALING = (8.0, 0.5, 4.0, 64)
# Projections with adapters, within a layer: our name -> the name in transformers.
PROJECTIONS = {
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/output": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}

# Of the tiny Gemma 3: its second layer is global, and the others have a window that long texts exceed.
WINDOW, GLOBAL_EVERY, ATTENTION_SCALAR = 16, 2, 10

_CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "gemma3_text": "Gemma3Text"}
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Number of parameters of the published models, without a separate output head.
PARAMETERS = {
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  # The only one with a separate output head, 152,064 x 3584, which the published number includes.
  "qwen2.5-7b": 7_615_616_512 - 152064 * 3584,
  # Their files contain the word vectors twice, also as `lm_head.weight`.
  "qwen3-0.6b": 751_632_384 - 151936 * 1024,
  "qwen3-1.7b": 2_031_739_904 - 151936 * 2048,
  "qwen3-4b": 4_022_468_096,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "gemma-3-270m": 268_098_176,
  "gemma-3-1b": 999_885_952,
  # The published number includes the image tower and the map of its outputs to D.
  "gemma-3-4b": 4_300_079_472 - 416_866_032 - (1152 * 2560 + 1152),
}
_NOT_DETERMINED_BY_WEIGHTS = (
  "architecture",
  "pretrained",
  "random_init",
  "pooling",
  "dtype",
  "residual_dtype",
  "base_dtype",
  "param_dtype",
  "remat",
  "remat_saved",
  "attention",
  "bidirectional",
  "lora_rank",
  "lora_alpha",
  "adapter",
)


def published(name):
  """Arguments of our decoder for a published model that its weights determine."""
  arguments = {key: value for key, value in ENCODERS[name].items() if key not in _NOT_DETERMINED_BY_WEIGHTS}
  return arguments | {"rope_scaling": arguments["rope_scaling"] or None}


def transformers_config(kind):
  """A small config of transformers; Llama and Gemma with scaled frequencies, Qwen3 and Gemma with wider heads."""
  rope = {"rope_type": "default", "rope_theta": 10000.0}
  if kind == "llama":
    rope |= {"rope_type": "llama3"} | dict(zip(_ROPE_KEYS, ROPE_SCALING, strict=True))
  values = dict(
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    hidden_size=DIM,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=MLP,
    max_position_embeddings=128,
    rope_parameters=rope,
    attn_implementation="eager",
  )
  if kind in ("qwen3", "gemma3_text"):
    values["head_dim"] = 12
  if kind == "gemma3_text":
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    values |= dict(
      rope_parameters={"full_attention": scaled, "sliding_attention": rope},
      query_pre_attn_scalar=ATTENTION_SCALAR,
      sliding_window=WINDOW,
      layer_types=layer_types,
    )
  return getattr(transformers, f"{_CLASSES[kind]}Config")(**values)


def hf_decoder(kind, seed=0):
  """A Qwen2Model, for example, whose parameters, norms and biases included, are all random."""
  model = getattr(transformers, f"{_CLASSES[kind]}Model")(transformers_config(kind))
  tiny_encoders.randomize(model, seed)
  return model.eval()


def with_image_tower(text):
  """A Gemma3Model whose text part is the given Gemma3TextModel."""
  tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16)
  model = transformers.Gemma3Model(
    transformers.Gemma3Config(
      text_config=text.config.to_dict(), vision_config=tower | {"patch_size": 8}, mm_tokens_per_image=1
    )
  )
  model.language_model.load_state_dict(text.state_dict())
  return model.eval()


def abstract(**arguments):
  """Structure, shapes and axes of our decoder."""
  return split_params(nnx.eval_shape(lambda: Decoder(**arguments, rngs=nnx.Rngs(0))))


def our_decoder(folder, **arguments):
  """Structure and loaded parameters of the decoder in a folder, without adapters."""
  graphdef, shapes, _ = abstract(**hf_config.encoder_arguments(folder) | arguments)
  table = tables.TABLES[hf_config.read_config(folder)["model_type"]]
  return graphdef, hf_folder.load_pretrained(folder, table, shapes)


def with_adapters(folder, adapters, **arguments):
  """As `our_decoder`, with adapters: `adapters` holds arrays at `layers/.../lora_a` and `lora_b`."""
  arguments = hf_config.encoder_arguments(folder) | arguments
  graphdef, shapes, _ = abstract(**arguments)
  base = {name: shape for name, shape in engine.flatten_tree(shapes).items() if "/lora_" not in name}
  table = tables.TABLES[hf_config.read_config(folder)["model_type"]]
  loaded = hf_folder.load_pretrained(folder, table, engine.unflatten_tree(base))
  params = engine.flatten_tree(loaded) | {name: jnp.asarray(value) for name, value in adapters.items()}
  assert params.keys() == engine.flatten_tree(shapes).keys()
  return graphdef, engine.unflatten_tree(params)


def peft_decoder(base, rank, alpha, seed=1):
  """`base` with rank-stabilized adapters of peft on all seven projections, A and B random."""
  with warnings.catch_warnings():  # peft 0.21 uses a deprecated name of transformers 5.23.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    model = peft.get_peft_model(
      base,
      peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=True, target_modules=[name.split(".")[1] for name in PROJECTIONS.values()]
      ),
    )
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def run_theirs(model, tokens, mask, **options):
  """The model of transformers on padded tokens; positions count the tokens that the mask keeps."""
  mask = torch.tensor(mask)
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  return model(torch.tensor(tokens), mask, position_ids=positions, use_cache=False, **options)
