"""A network as it is proved robust: in float64, whose rounding is far below what a margin must exceed, unless the
network cancels some fifteen digits. That is not looked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rampart.bounds import crown
from rampart.bounds.box import covering
from rampart.bounds.margins import Engine, Method, find_layout, margin_bounds
from rampart.models import Layout, double_copy


@dataclass(frozen=True)
class Exact:
    """
    Args:
        model: in float64, or as it is where it cannot be run so.
        layout: its structure, in float64; None where auto_LiRPA has to bound it.
        dtype: the type in which it is bounded.
    """

    model: nn.Module
    layout: Layout | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Exact:
        """Of a model that takes images like x [B, C, H, W]; errors as `find_layout`."""
        layout, copy = find_layout(model, x), double_copy(model, x[:1])
        double = layout is not None or copy is not None
        return cls(copy or model, layout.double() if layout else None, torch.float64 if double else x.dtype)

    def bounds(self, x: Tensor, y: Tensor, eps: float, method: Method, memory: int = crown.MEMORY) -> Tensor:
        """`margin_bounds` over the ball of radius eps (pixels), `covering` what float32 rounds of its pixels."""
        engine: Engine = "native" if self.layout else "auto_lirpa"
        x, eps = x.to(self.dtype), covering(eps)
        return margin_bounds(self.model, x, y, eps, method, engine, memory, self.layout, single=True)

    def logits(self, x: Tensor) -> Tensor:
        """[B, K]."""
        x = x.to(self.dtype)
        with torch.no_grad():
            return self.layout.resolve(x).output if self.layout else self.model(x)
