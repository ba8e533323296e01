"""Trains one arm: a recipe's stages, one after the other."""

from __future__ import annotations

import torch

from rampart.data import Augmentation, Dataset
from rampart.errors import ModelError
from rampart.kernels import compiling
from rampart.models import Classifier, build_model, interval_init
from rampart.training.criterion import Criterion
from rampart.training.loop import Recorder, Stage, fit
from rampart.training.methods import METHODS, Normal
from rampart.training.recipe import Recipe
from rampart.training.state import State, Streams


def train(
    recipe: Recipe,
    data: Dataset,
    recorder: Recorder,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    before: State | None = None,
) -> Classifier:
    """Trains the recipe's arm on data.train, choosing epochs on data.val; data.test is never read.

    Args:
        augmentation: of training images, used where `recipe.augment` holds; default the study's.
        seed: of initial weights, batch order, augmentation and attack starts; the same seed gives the same model on
            the same machine with the same number of threads.
        before: where an interrupted training of the same recipe, data and seed stood: it is gone on with, to the same
            model.

    Raises:
        TrainingDiverged: a loss became NaN or infinite, or all ReLUs of a layer died. ModelError: `before` is of
            another training.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM), and has left a checkpoint.

    Returns:
        The chosen epoch's model, in eval mode, on `device`.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    model = build_model(recipe.architecture, data.in_shape, len(data.classes), recipe.width).to(device)
    if recipe.init == "ibp":
        interval_init(model)
    streams = Streams(torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed + 1))
    if not recipe.augment:
        augmentation = None
    elif augmentation is None:
        augmentation = Augmentation()
    on_device = data.to(device)
    epoch, plan = 1, stages(recipe, model)
    if before is not None and before.stage not in {stage.name for stage in plan}:
        raise ModelError(f"the checkpoint is of a stage '{before.stage}', which this training does not have")
    for stage in plan:
        if before is not None and before.stage != stage.name:  # finished: its outcome is among the weights kept
            epoch += stage.epochs
            continue
        with compiling(recipe.compile):
            best = fit(stage, model, on_device, recipe, augmentation, streams, recorder, epoch, before)
        before = None
        recorder.metrics({f"{stage.name}/best_epoch": best}, step=epoch + stage.epochs - 1)
        epoch += stage.epochs
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def stages(recipe: Recipe, model: Classifier) -> list[Stage]:
    """One stage, or the encoder's and the head's for `double`."""
    method = METHODS[recipe.method](model, recipe)
    cross_entropy = Criterion(0.0, recipe.temperature)
    if recipe.contrastive == "double":
        head = method if recipe.head == "method" else Normal(model, recipe)
        shaping = Criterion(recipe.encoder_supcon_weight, recipe.temperature)
        # With a share of cross-entropy the encoder needs a head to pass it on; that is trained further afterwards.
        trained = model if shaping.needs_logits else model.encoder
        return [
            Stage("encoder", trained, recipe.encoder_epochs, method, shaping),
            Stage("head", model.head, recipe.head_epochs, head, cross_entropy),
        ]
    weight = recipe.supcon_weight if recipe.contrastive == "single" else 0.0
    return [Stage("train", model, recipe.epochs, method, Criterion(weight, recipe.temperature))]
