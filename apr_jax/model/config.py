"""The shape of the transformer."""

import dataclasses
import math
from typing import Literal

_SIZES = ("layers", "width", "heads", "kv_heads", "head_size", "mlp")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches its rotary embedding beyond the length of its pretraining.

    A pair of entries that turns fewer than `low_frequency_turns` times over the original length
    turns `factor` times slower. One that turns more than `high_frequency_turns` times is left as
    it is, and in between the slowing grows linearly with the number of turns.

    Attributes:
      factor: how much slower the slow pairs turn; 1 is no scaling.
      low_frequency_turns: `low_freq_factor` of Hugging Face.
      high_frequency_turns: `high_freq_factor` of Hugging Face.
      original_length: `original_max_position_embeddings` of Hugging Face.
    """

    factor: float = 1.0
    low_frequency_turns: float = 1.0
    high_frequency_turns: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        group = "model.rope_scaling"
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"{group}.factor={self.factor} must be at least 1 and finite")
        if not 0 < self.low_frequency_turns < self.high_frequency_turns < math.inf:
            raise ValueError(
                f"{group}.low_frequency_turns={self.low_frequency_turns} must be above 0 and below"
                f" {group}.high_frequency_turns={self.high_frequency_turns}"
            )
        if self.original_length < 1:
            raise ValueError(f"{group}.original_length={self.original_length} must be at least 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the families Llama, Qwen2 and Qwen3; the defaults are those of Llama 2.

    With all six sizes at 0 the network is left open: that of the model from which a training starts
    is taken (`apr train sft --init`).

    Attributes:
      layers: N, number of layers.
      width: D, width of the residual stream.
      heads: H, query heads.
      kv_heads: G, key/value heads; H must be a multiple.
      head_size: K, even because the rotary embedding turns pairs; H times K need not be D.
      mlp: hidden size of the SwiGLU.
      tied: whether the output projection is the embedding's transpose.
      norm_epsilon: what is added to the mean square in every norm.
      qkv_bias: whether a bias is added to queries, keys and values (Qwen2).
      qk_norm: whether each head's queries and keys are normalized before they are turned (Qwen3).
      rope_base: base of the rotary embedding's wavelengths, above 1.
      rope_scaling: how long wavelengths are stretched (Llama 3).
      max_positions: the longest text that other programs may give the network, which `apr export`
        tells them (`max_position_embeddings` of Hugging Face). Nothing here depends on it. Left at
        the default it is that of the model from which a training starts.
      dtype: type of the computation.
      param_dtype: type in which parameters are kept, in memory and in checkpoints. In bfloat16 they
        take half the room; those of norms, which are few, stay float32. Updates are computed in
        float32, and rounded at random (`train/rounding.py`).
      remat: what the backward pass computes again within a layer: nothing ("none"), everything
        ("layer", which takes least memory and a third more products), or everything but attention
        and the products with weights ("dots").
    """

    layers: int = 0
    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    mlp: int = 0
    tied: bool = True
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = 4_096
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "layer", "dots"] = "none"

    def __post_init__(self):
        if not self.is_open:
            self._check_sizes()
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"model.rope_base={self.rope_base} must be above 1 and finite")
        if self.max_positions < 1:
            raise ValueError(f"model.max_positions={self.max_positions} must be at least 1")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"model.norm_epsilon={self.norm_epsilon} must be between 0 and 1")

    @property
    def is_open(self) -> bool:
        """Whether the network is that of the model from which a training starts."""
        return not any(getattr(self, field) for field in _SIZES)

    def _check_sizes(self) -> None:
        """Raises ValueError if a size cannot be used."""
        for field in _SIZES:
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if self.head_size % 2:
            raise ValueError(
                f"model.head_size={self.head_size} must be even: rotary embedding turns pairs"
            )
