"""Which heads look near and which look far: spans (Eq. 7), and the split into local and global heads.

The paper samples five layers of the model's middle third. A head's span is the mean distance it looks back. The 30 % of
heads with the lowest span are the local heads H_loc, the 30 % with the highest span are the global heads H_glob.
WAAD is read from the local heads, FAI from the global ones (metrics.py). Only torch is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """A head split. Spans and masks are [layers,H]: a row for each sampled layer, a column for each of its heads."""

    layers: list[int]  # numbers of the sampled layers
    spans: Tensor  # float32, in tokens
    is_local: Tensor  # bool, H_loc: the heads that look near
    is_global: Tensor  # bool, H_glob: the heads that look far


def layer_range(num_layers: int, where: str = "middle", count: int = 5) -> list[int]:
    """Up to `count` evenly spaced layers of the bottom, middle or top third, or of all layers; sorted, distinct.

    >>> layer_range(36), layer_range(12, "top"), layer_range(12, "all"), layer_range(2)
    ([12, 15, 18, 21, 24], [8, 9, 10, 11], [0, 3, 6, 8, 11], [0, 1])
    """
    third, last = num_layers / 3, num_layers - 1
    ends = {"bottom": (0, third), "middle": (third, 2 * third), "top": (2 * third, last), "all": (0, last)}
    if where not in ends:
        raise ValueError(f"unknown layer range {where!r}: choose one of {', '.join(ends)}")
    low, high = (min(int(end), last) for end in ends[where])
    gaps = max(count - 1, 1)
    return sorted({low + (i * (high - low) + gaps // 2) // gaps for i in range(count)})  # rounded to the nearest layer


def middle_layers(num_layers: int, count: int = 5) -> list[int]:
    """The paper's choice: `count` evenly spaced layers from floor(L/3) to floor(2L/3)."""
    return layer_range(num_layers, "middle", count)


def head_spans(maps: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7, the definition: how many tokens back each head looks, mean over all response rows of the batch.

    maps [B,H,N,N] (row t, column s); mask [B,N] bool, the response tokens. Returns [H] float32.

    >>> look_back_one = torch.eye(3).roll(1, 0)[None, None]  # rows 1 and 2 attend to the token before
    >>> head_spans(look_back_one, torch.tensor([[False, True, True]]))
    tensor([1.])
    """
    t = torch.arange(maps.shape[-1], device=maps.device)
    distance = (t[:, None] - t).clamp(min=0)  # [N,N], t - s
    row_means = (maps.float() * distance).sum(-1)  # [B,H,N]
    return (row_means * mask[:, None]).sum((0, 2)) / mask.sum()


def split_heads(spans: Tensor, quantile: float = 0.3) -> tuple[Tensor, Tensor]:
    """The heads of lowest span (H_loc) and those of highest span (H_glob), as bool masks shaped like spans.

    Each group has floor(quantile * heads) members, at least one. The groups are disjoint.

    >>> split_heads(torch.tensor([[3.0, 9.0], [1.0, 5.0]]))
    (tensor([[False, False],
            [ True, False]]), tensor([[False,  True],
            [False, False]]))
    """
    if not 0 < quantile <= 0.5:
        raise ValueError(f"quantile {quantile}: the two groups are disjoint, so it lies in (0, 0.5]")
    if spans.numel() < 2:
        raise ValueError(f"{spans.numel()} sampled head: a split into local and global needs two")
    size = max(1, int(quantile * spans.numel() + 1e-6))  # 1e-6: 0.29 * 100 is 28.999999999999996
    order = spans.flatten().argsort(stable=True)
    is_local, is_global = torch.zeros(2, spans.numel(), dtype=torch.bool, device=spans.device)
    is_local[order[:size]] = True
    is_global[order[-size:]] = True
    return is_local.view_as(spans), is_global.view_as(spans)
