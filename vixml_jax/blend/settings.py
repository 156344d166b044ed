"""Settings that a trained blend needs when it ranks, as an index stores them."""

import dataclasses
from typing import Any

from vixml_jax.blend.candidates import DEFAULT_WIDTHS, BlendWidths


@dataclasses.dataclass(frozen=True)
class BlendSettings:
  """Settings of a trained blend.

  Attributes:
    propensity_a: A of the propensities that the dial uses, see `datasets.propensity.inverse_propensity`.
    propensity_b: B of them.
    widths: How many results of each source become candidates. The model was trained with these.
  """

  propensity_a: float
  propensity_b: float
  widths: BlendWidths = DEFAULT_WIDTHS

  def as_json(self) -> dict[str, Any]:
    """Returns the settings as JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, settings: dict[str, Any]) -> "BlendSettings":
    """Returns the settings that `as_json` returned."""
    return cls(**(settings | {"widths": BlendWidths(**settings["widths"])}))
