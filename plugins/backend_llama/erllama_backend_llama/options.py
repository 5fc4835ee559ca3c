"""``model_opts`` of a model whose backend is ``llama``."""

from __future__ import annotations

import ctypes
import math
from typing import Literal

import attrs
from attrs import validators

ALL_LAYERS = -1
Pooling = Literal["mean", "cls", "last"]
"""How the vectors of a text's tokens become one: their mean, the first, or the last one."""
_MOST = 2**31 - 1
"""The largest value of the int32 that takes these; ctypes would wrap a larger one."""


def _shares(
    _options: LlamaOptions, attribute: attrs.Attribute[tuple[float, ...]], shares: tuple[float, ...]
) -> None:
    shares = tuple(ctypes.c_float(share).value for share in shares)  # what llama.cpp will read
    if any(not math.isfinite(share) or share < 0.0 for share in shares):
        raise ValueError(f"{attribute.name} holds proportions, each 0 or more; got {shares}")
    if shares and not any(shares):
        raise ValueError(f"{attribute.name} gives no device a share of the model; got {shares}")


@attrs.frozen(kw_only=True)
class LlamaOptions:
    """How the weights are loaded. ValueError for values that cannot mean anything."""

    n_gpu_layers: int = attrs.field(
        default=ALL_LAYERS, validator=(validators.ge(ALL_LAYERS), validators.le(_MOST))
    )
    """Layers on the GPU; -1: all. A build without GPU support keeps them all on the CPU."""
    main_gpu: int = attrs.field(default=0, validator=(validators.ge(0), validators.le(_MOST)))
    """The device that has the whole model when ``split_mode`` is ``"none"``."""
    split_mode: Literal["none", "layer", "row"] = attrs.field(
        default="layer", validator=validators.in_(("none", "layer", "row"))
    )
    """How several GPUs share the model."""
    tensor_split: tuple[float, ...] = attrs.field(default=(), converter=tuple, validator=_shares)
    """Each device's proportion of the model; empty: by free memory."""
    use_mmap: bool = True
    """Map the file instead of reading it: pages are shared and loaded as they are needed."""
    use_mlock: bool = False
    """Keep the weights from being swapped out."""
    vocab_only: bool = False
    """Load the vocabulary and the chat template alone: text and tokens, and nothing computed."""
    pooling: Pooling | None = attrs.field(
        default=None, validator=validators.optional(validators.in_(("mean", "cls", "last")))
    )
    """How embeddings are pooled. None: as the file says, else their mean."""
