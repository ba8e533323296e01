"""One step of training: a batch's loss, its gradients, the optimiser, the average of the weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rampart.models import Classifier
from rampart.training.criterion import Criterion
from rampart.training.methods import Method
from rampart.training.muon import Muon
from rampart.training.recipe import Recipe
from rampart.training.state import Streams

log = logging.getLogger(__name__)

# Steps at one ε that a GPU takes one kernel after the other before they are recorded: libraries choose their kernels
# and fetch their memory in the first, and code that is compiled waits for the GPU.
BEFORE_RECORDING = 3
# Steps after which one that still waits for the GPU is thought to do so for good.
PATIENCE = 20


class Step:
    """Trains `trained`, the model or a part of it, on one batch after the other.

    On a GPU, where it takes longer to start a small network's kernels than to run them, the step of a full batch is
    recorded as a CUDA graph as soon as ε stands still, and replayed from then on.

    Args:
        criterion: what `method` makes a loss of.
        streams: its `device` stream is drawn from.
    """

    def __init__(
        self,
        trained: nn.Module,
        model: Classifier,
        method: Method,
        criterion: Criterion,
        recipe: Recipe,
        streams: Streams,
    ) -> None:
        self.trained, self.model, self.method, self.criterion = trained, model, method, criterion
        self.recipe, self.streams = recipe, streams
        self.maps = [m.weight for m in trained.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        linear = (m for m in model.encoder.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad)
        self.thinned = next(linear, None) if recipe.dropout else None
        self.stream: torch.cuda.Stream | None = None
        self.device = device = next(model.parameters()).device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.optimizers = _optimizers(trained, model.head, recipe, device)
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        # Of the steps that were `taken` one kernel after the other, and of the one that is recorded.
        self.eps, self.taken, self.waits = -1.0, 0, [""]
        self.recorded: _Recorded | None = None

    def __call__(self, x: Tensor, y: Tensor, eps: float, lr: float) -> Tensor:
        """The loss (a scalar, before the step) on x [B, C, H, W] in [0, 1], y [B], at radius eps (pixels)."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.stream is None:
            return self._take(x, y, eps)
        if eps != self.eps:
            self.eps, self.taken, self.recorded = eps, 0, None
        whole = len(y) == self.recipe.batch_size
        if whole and not self.waits and self.taken >= BEFORE_RECORDING:
            self.recorded = self.recorded or _Recorded(self, self.stream, x, y)
            return self.recorded(x, y)
        here = torch.cuda.current_stream(self.device)
        # Where it will be recorded: gradients remember the stream that they were first summed up on.
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), _waits() as waits:
            loss = self._take(x, y, eps)
        here.wait_stream(self.stream)
        if whole:
            self.taken, self.waits = self.taken + 1, waits
            if waits and self.taken == PATIENCE:
                log.warning("training waits for the GPU in every step, which makes it slow: %s", waits[0])
        return loss

    def _take(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        loss = self._gradients(x, y, eps)
        if self.recipe.sam:
            with _sharpest(self.trained, self.recipe.sam):
                self._gradients(x, y, eps)
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            _average(self.average, self.model)
        return loss

    def _gradients(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """The loss, whose gradients the weights have afterwards."""
        draws = self.streams.device
        with _thinned(self.thinned, self.recipe.dropout, draws) if self.thinned else nullcontext():
            loss = self.method.batch_loss(x, y, self.criterion, eps, draws)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if self.recipe.l1:
            penalty = self.recipe.l1 * torch.stack([weight.abs().sum() for weight in self.maps]).sum()
            penalty.backward()
            loss = loss.detach() + penalty
        return loss.detach()


def _optimizers(
    trained: nn.Module, head: nn.Module, recipe: Recipe, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Each weight of `trained` belongs to one of them."""
    on_gpu = device.type == "cuda"
    # A recorded step reads its learning rate from the GPU's memory.
    lr = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr
    weights = list(trained.parameters())
    # Muon's are the matrices between hidden layers: a row of the head stands for a class by itself.
    apart = set(weights if recipe.optimizer == "adam" else head.parameters())
    matrices = [weight for weight in weights if weight.dim() > 1 and weight not in apart]
    others = [weight for weight in weights if weight.dim() <= 1 or weight in apart]
    decay = recipe.weight_decay
    adam = torch.optim.Adam(others, lr=lr, weight_decay=decay, fused=True, capturable=on_gpu)
    return [adam, Muon(matrices, lr=lr, weight_decay=decay)] if matrices else [adam]


@contextmanager
def _sharpest(trained: nn.Module, radius: float) -> Iterator[None]:
    """Moves the weights by `radius`, in L2 norm, along their gradients: within that radius the loss rises most there,
    to first order (Foret et al. 2021, eq. 2). Weights and running statistics are as before at the end of the block."""
    pairs = [(weight, weight.grad) for weight in trained.parameters() if weight.grad is not None]
    weights, gradients = ([*side] for side in zip(*pairs, strict=True))
    with torch.no_grad():
        # Where the statistics stood still, as under `standing`, the pass would be compiled a second time.
        moved = [*weights, *trained.buffers()]
        kept = [value.clone() for value in moved]
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_add_(weights, torch._foreach_mul(gradients, radius / (length + 1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, kept)


@contextmanager
def _thinned(layer: nn.Linear, share: float, generator: torch.Generator) -> Iterator[None]:
    """Does without a share of the layer's inputs: its weights are multiplied by a mask; at the end of the block they
    are as before, and their gradients are multiplied by the mask."""
    with torch.no_grad():
        kept = layer.weight.clone()
        drawn = torch.rand(layer.in_features, device=kept.device, generator=generator)
        mask = (drawn >= share).to(kept.dtype) / (1 - share)
        layer.weight.mul_(mask)
    try:
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(kept)
            if layer.weight.grad is not None:
                layer.weight.grad.mul_(mask)


class _Recorded:
    """A step on batches of one size at one ε."""

    def __init__(self, step: Step, stream: torch.cuda.Stream, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(memory_format=torch.contiguous_format), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(step.streams.device)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = step._take(self.x, self.y, step.eps)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Fills with what has made the host wait for the GPU by the end of the block."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits += [f"{w.message} ({w.filename}:{w.lineno})" for w in told if "called a synchronizing" in str(w.message)]


@torch.no_grad()
def _average(average: AveragedModel, model: nn.Module) -> None:
    """As average.update_parameters, which waits for a GPU at every step."""
    if not average.n_averaged:
        average.update_parameters(model)
        return
    held, new = ([*m.parameters(), *m.buffers()] for m in (average.module, model))
    average_into = average.multi_avg_fn
    assert average_into is not None
    for real in (True, False):  # BatchNorm counts its batches in whole numbers
        alike = [place for place, value in enumerate(new) if value.is_floating_point() is real]
        if alike:
            average_into([held[place] for place in alike], [new[place] for place in alike], average.n_averaged)
    average.n_averaged += 1
