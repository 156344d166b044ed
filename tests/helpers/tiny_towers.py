"""Tiny random CLIP and DINOv2 towers of transformers in folders, with image processors, and their features."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.helpers import tiny_encoders

# 30 = 3 * 8 + 6 has a remainder that is ignored.
_CLIP = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=30, patch_size=8
)
_DINOV2 = dict(hidden_size=24, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=3, image_size=40, patch_size=8)
_TEXT = dict(
  vocab_size=20,
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
  bos_token_id=1,
  eos_token_id=2,
)


def _clip(**changes):
  return transformers.CLIPVisionConfig(**_CLIP, projection_dim=10, **changes)


def _clip_model():
  # The projection of the whole model has its own size, not that of the vision config.
  return transformers.CLIPModel(
    transformers.CLIPConfig(text_config=_TEXT, vision_config=_clip().to_dict(), projection_dim=11)
  )


def _dinov2(**changes):
  return transformers.Dinov2Model(transformers.Dinov2Config(**_DINOV2, **changes))


def _registers(**changes):
  return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**_DINOV2, **changes))


# Name -> the model, and the size of its features.
TOWERS = {
  "clip": (lambda: transformers.CLIPVisionModel(_clip()), 24),
  "clip gelu": (lambda: transformers.CLIPVisionModel(_clip(hidden_act="gelu")), 24),
  "clip projection": (lambda: transformers.CLIPVisionModelWithProjection(_clip()), 10),
  "clip projection gelu": (lambda: transformers.CLIPVisionModelWithProjection(_clip(hidden_act="gelu")), 10),
  "clip and text": (_clip_model, 11),
  "dinov2": (_dinov2, 24),
  "dinov2 swiglu": (lambda: _dinov2(use_swiglu_ffn=True), 24),
  "dinov2 registers": (_registers, 24),
  "dinov2 registers swiglu": (lambda: _registers(use_swiglu_ffn=True, num_register_tokens=3), 24),
  "dinov2 classifier": (
    lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_DINOV2, num_labels=2)),
    24,
  ),
}


def hf_tower(name, seed=0):
  """A model of `TOWERS` whose parameters, norms and biases included, are all random."""
  model = TOWERS[name][0]()
  tiny_encoders.randomize(model, seed)
  return model.eval()


def hf_features(model, pixels):
  """The features of normalized pixels [B, H, W, 3] that transformers computes, of any size."""
  images = torch.tensor(np.asarray(pixels, np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    if isinstance(model, transformers.CLIPModel):
      return model.get_image_features(images, interpolate_pos_encoding=True).pooler_output.numpy()
    if isinstance(model, transformers.CLIPVisionModelWithProjection):
      return model(images, interpolate_pos_encoding=True).image_embeds.numpy()
    if isinstance(model, transformers.CLIPVisionModel):
      return model(images, interpolate_pos_encoding=True).pooler_output.numpy()
    return getattr(model, "dinov2", model)(images).pooler_output.numpy()


def hf_processor(name, edge, size):
  """The image processor of a model of `TOWERS`: the shorter edge, and the square in the middle."""
  kind = CLIPImageProcessorPil if name.startswith("clip") else BitImageProcessorPil
  colors = {} if name.startswith("clip") else {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
  return kind(size={"shortest_edge": edge}, crop_size={"height": size, "width": size}, **colors)


def write_tower(folder, name, edge=36, size=30):
  """Writes a model of `TOWERS` and its processor, and returns both."""
  model, processor = hf_tower(name), hf_processor(name, edge, size)
  model.save_pretrained(folder)
  processor.save_pretrained(folder)
  return model, processor


def change_json(path, **changes):
  """Changes keys of a JSON file; a key with the value `...` is removed."""
  values = json.loads(Path(path).read_text()) | changes
  Path(path).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
