"""The device of the sides in PyTorch."""

import torch


def device() -> torch.device:
  """Returns the GPU if there is one, else the CPU."""
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
  """Waits until the GPU has finished."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()
