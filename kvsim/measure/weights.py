"""The weights of one attention call: softmax(QK^T) in float32, a block of query rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HIDDEN = float("-inf")


@dataclass(frozen=True)
class Call:
    """What one layer's attention was called with, for the query rows of the current forward pass.

    `q`: [batch, query heads, rows, dim]; `k`: [batch, KV heads, keys, dim], where query head h reads KV
    head h // group. `mask`: bool (True = may look) or additive, [batch or 1, 1 or query heads, rows, keys],
    or None: causal if `causal` and there are several rows, else unrestricted. `past`: tokens before the
    first row. `softcap` bounds the scores as c*tanh(x/c); `sinks` [query heads] is one learned extra score
    per head that takes part in the softmax and belongs to no key. `window`: tokens a sliding layer sees.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    past: int
    softcap: float | None = None
    sinks: Tensor | None = None
    causal: bool = True
    window: int | None = None

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def first_key(self) -> int:
        """Token that key column 0 belongs to: above 0 once a sliding layer has dropped its oldest keys."""
        return max(0, self.past + self.rows - self.keys)

    def visible_from(self, row: int) -> int:
        """First token that query row `row` of this call can see, padding aside."""
        within = 0 if self.window is None else self.past + row + 1 - self.window
        return max(self.first_key, within, 0)

    def trimmed(self) -> Call:
        """Without the unused tail of a preallocated (static) cache, and without mask columns beyond the keys."""
        total = self.past + self.rows
        k = self.k[:, :, :total]
        mask = None if self.mask is None else self.mask[..., -self.rows :, : k.shape[2]]
        return replace(self, k=k, mask=mask)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first row, weights [batch, KV heads, group, rows, keys], sink weights [batch, KV heads, group, rows]).

        The key axis ends at the last key that an implicit causal mask lets the block see, so the parts that
        cannot hold weight are never computed. Memory is that of `size` rows.
        """
        k = self.k.float().transpose(-1, -2)
        for first in range(0, self.rows, size):
            last = min(self.rows, first + size)
            yield first, *self._block(k, first, last)

    def _block(self, k: Tensor, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        batch, heads, _, dim = self.q.shape
        rows, group = last - first, heads // self.kv_heads
        offset = self.past - self.first_key
        implicit = self.mask is None and self.causal and self.rows > 1
        keys = offset + last if implicit else self.keys
        # one matrix product per KV head: the query heads of its group lie side by side in the row axis
        q = self.q[:, :, first:last].float().reshape(batch, self.kv_heads, group * rows, dim)
        score = torch.matmul(q, k[..., :keys]).mul_(self.scale).view(batch, self.kv_heads, group, rows, keys)
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        if self.mask is not None:
            score = _masked(score, self.mask[:, :, first:last, :keys])
        elif implicit:
            row = offset + torch.arange(first, last, device=score.device)
            score = score.masked_fill(torch.arange(keys, device=score.device) > row[:, None], _HIDDEN)
        if self.sinks is None:
            return torch.softmax(score, -1).nan_to_num_(0.0), None  # nan: a padding row that sees nothing
        extra = self.sinks.float().view(1, self.kv_heads, group, 1, 1).expand(batch, -1, -1, rows, 1)
        weight = torch.softmax(torch.cat([score, extra], -1), -1)
        return weight[..., :-1], weight[..., -1]


def _masked(score: Tensor, mask: Tensor) -> Tensor:
    """Scores under a bool or additive mask; an additive one hides with the lowest finite number or -inf."""
    shape = score.shape
    per_head = mask.shape[1] != 1
    mask = mask.reshape(mask.shape[0], *shape[1:]) if per_head else mask[:, :, None]
    if mask.dtype == torch.bool:
        return score.masked_fill(~mask, _HIDDEN)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (score + mask.float()).masked_fill(hidden, _HIDDEN)


def output(call: Call, v: Tensor, weights: Tensor) -> Tensor:
    """Attention output [batch, rows, query heads, dim] of a block's weights, in the dtype of `v`."""
    batch, kv_heads, group, rows, keys = weights.shape
    flat = weights.to(v.dtype).reshape(batch, kv_heads, group * rows, keys)
    mixed = torch.matmul(flat, v[:, :, :keys])
    return mixed.view(batch, kv_heads * group, rows, -1).transpose(1, 2)
