"""The shape of the transformer."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder in the style of Llama 2.

    Attributes:
      layers: N, number of layers.
      width: D, width of the residual stream.
      heads: H, query heads.
      kv_heads: G, key/value heads; H must be a multiple.
      head_size: K, even because the rotary embedding turns pairs.
      mlp: hidden size of the SwiGLU.
      tied: whether the output projection is the embedding's transpose.
      rope_base: base of the rotary embedding's wavelengths, above 1.
      dtype: type of the computation; parameters are float32.
      remat: what the backward pass computes again within a layer: nothing ("none"), everything
        ("layer", which takes least memory and a third more products), or everything but attention
        and the products with weights ("dots").
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    tied: bool = True
    rope_base: float = 10_000.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "layer", "dots"] = "none"

    def __post_init__(self):
        for field in ("layers", "width", "heads", "kv_heads", "head_size", "mlp"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if self.head_size % 2:
            raise ValueError(
                f"model.head_size={self.head_size} must be even: rotary embedding turns pairs"
            )
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"model.rope_base={self.rope_base} must be above 1 and finite")
