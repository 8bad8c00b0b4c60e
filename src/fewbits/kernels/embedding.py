"""embedding: the rows of a packed table that some ids ask for.

    embedding(ids [...], weight [N, K] packed, dtype) -> [..., K], in dtype, on the device of the table

Only the rows asked for are decoded, each as often as it is asked for: a batch of T tokens costs T rows, not N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.packed import Packed


def embedding(ids: Tensor, weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look up ids (integers, any shape) in a packed table [N, K]."""
    return weight.rows(ids.flatten(), dtype).reshape(*ids.shape, weight.shape[1])
