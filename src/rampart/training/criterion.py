"""What a stage of training minimises on a method's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from rampart.losses import supcon_loss


class Network(Protocol):
    """What a criterion asks of a classifier."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def embed(self) -> Callable[[Tensor], Tensor]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Outputs(NamedTuple):
    """A batch's cross-entropy (a scalar) and embeddings, or bounds that stand for them; None if not needed.

    The embeddings are [B, D], or [V * B, D] for V views of the batch, one after the other.
    """

    cross_entropy: Tensor | None
    embeddings: Tensor | None


@dataclass(frozen=True)
class Criterion:
    """a * SupCon + (1 - a) * cross-entropy: a = 0 is plain training, a = 1 the encoder of `double`, else `single`."""

    supcon_weight: float
    temperature: float

    @property
    def needs_logits(self) -> bool:
        return self.supcon_weight < 1

    @property
    def needs_embeddings(self) -> bool:
        return self.supcon_weight > 0

    def clean(self, model: Network, embeddings: Tensor, labels: Tensor) -> Outputs:
        """The outputs on embeddings [B, D] as they are."""
        cross_entropy = F.cross_entropy(model.head(embeddings), labels) if self.needs_logits else None
        return Outputs(cross_entropy, embeddings if self.needs_embeddings else None)

    def __call__(self, outputs: Outputs, labels: Tensor) -> Tensor:
        terms = []
        if outputs.cross_entropy is not None:
            terms.append((1 - self.supcon_weight) * outputs.cross_entropy)
        if outputs.embeddings is not None:
            views = len(outputs.embeddings) // len(labels)
            terms.append(self.supcon_weight * supcon_loss(outputs.embeddings, labels.repeat(views), self.temperature))
        return sum(terms[1:], terms[0])

    def on_images(self, model: Network, x: Tensor, labels: Tensor) -> Tensor:
        """The loss on images x [B, C, H, W] as they are."""
        return self(self.clean(model, model.embed(x), labels), labels)
