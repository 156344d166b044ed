"""The files of the published models that the configs and the documents name, as their pages on the hub list them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishedModel:
  """What the hub has of a model.

  Attributes:
    num_files: Number of safetensors files: 1 for `model.safetensors`, more for shards with an index, 0 if the model is
      published in other formats only.
    tokenizer: Whether it has `tokenizer.json`.
    gated: Whether the files can be fetched only after the license has been accepted on the model's page.
  """

  num_files: int = 1
  tokenizer: bool = True
  gated: bool = False

  @property
  def files(self) -> tuple[str, ...]:
    """Names of the files that this package reads."""
    if self.num_files > 1:
      shards = tuple(f"model-{n:05}-of-{self.num_files:05}.safetensors" for n in range(1, self.num_files + 1))
      weights = ("model.safetensors.index.json", *shards)
    else:
      weights = ("model.safetensors",) * self.num_files
    return ("config.json", *weights, *(("tokenizer.json",) * self.tokenizer))


# Name on the hub -> its files. The files of a model that is not listed here are unknown until the hub lists them.
PUBLISHED: dict[str, PublishedModel] = {
  "sentence-transformers/paraphrase-MiniLM-L3-v2": PublishedModel(),
  "sentence-transformers/all-MiniLM-L6-v2": PublishedModel(),
  "sentence-transformers/msmarco-distilbert-base-v4": PublishedModel(),
  "intfloat/e5-base-v2": PublishedModel(),
  "Qwen/Qwen2.5-0.5B-Instruct": PublishedModel(),
  "Qwen/Qwen2.5-1.5B-Instruct": PublishedModel(),
  "Qwen/Qwen2.5-3B-Instruct": PublishedModel(num_files=2),
  "Qwen/Qwen2.5-7B-Instruct": PublishedModel(num_files=4),
  "Qwen/Qwen3-0.6B": PublishedModel(),
  "Qwen/Qwen3-1.7B": PublishedModel(num_files=2),
  "Qwen/Qwen3-4B": PublishedModel(num_files=3),
  "meta-llama/Llama-3.2-1B-Instruct": PublishedModel(gated=True),
  "meta-llama/Llama-3.2-3B-Instruct": PublishedModel(num_files=2, gated=True),
  "google/gemma-3-270m-it": PublishedModel(gated=True),
  "google/gemma-3-1b-it": PublishedModel(gated=True),
  "google/gemma-3-4b-it": PublishedModel(num_files=2, gated=True),
  "google/siglip2-so400m-patch14-384": PublishedModel(),
}
