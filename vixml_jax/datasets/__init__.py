"""Raw files of extreme classification data sets, prepared as TFDS data sets without TensorFlow."""

from vixml_jax.datasets.prepared import open_dataset, prepare

__all__ = ["open_dataset", "prepare"]
