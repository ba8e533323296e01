"""What the evidence allows to show, in the study's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rampart.evaluation.trust import MEANING
from rampart.reports import charts, derived, pictures, statistics, tables
from rampart.reports.drawing import Drawing
from rampart.reports.evidence import Evidence
from rampart.reports.numbers import summarise
from rampart.settings import eps_text

SUSPECT = f" {tables.MARK}: the attack has failed a check and may have missed much."


@dataclass(frozen=True)
class Section:
    """A table, a figure, or both, with what they show.

    Args:
        steps: of the runs that it rests on, whose notes are shown with it.
        printed: whether the terminal gets its table, too.
    """

    name: str
    title: str
    text: str
    table: pd.DataFrame | None = None
    drawing: Drawing | None = None
    steps: tuple[str, ...] = ()
    printed: bool = False


@dataclass(frozen=True)
class Material:
    """What sections are made of.

    Args:
        summary: of ours and of the published numbers together.
        published: another source's numbers, none of them where no baseline was given.
    """

    evidence: Evidence
    summary: pd.DataFrame
    published: pd.DataFrame

    def has(self, metric: str, step: str) -> bool:
        found = self.summary["metric"].str.startswith(metric) & (self.summary["step"] == step)
        return bool(found.any())


def material_of(evidence: Evidence, published: pd.DataFrame | None = None) -> Material:
    """Published numbers of arms that we do not have are not shown."""
    if published is None:
        published = evidence.values.head(0)
    published = published[published["arm"].isin(evidence.values["arm"])]
    ours = derived.on_common_images(evidence)
    return Material(evidence, summarise(pd.concat([ours, published], ignore_index=True)), published)


def sections(material: Material) -> list[Section]:
    """Those for which there is something to show."""
    return [section for build in SECTIONS for section in build(material)]


def _rates(given: Material) -> Iterator[Section]:
    summary = given.summary
    if not given.has("accuracy", "evaluate"):
        return
    yield Section(
        "accuracy",
        "Accuracy (the study's Figure 3)",
        "Share of the test images that are classified correctly. Paler bars: with SupCon; "
        "lines: the standard deviation over seeds." + (" Strokes: published." if len(given.published) else ""),
        tables.accuracy(summary),
        charts.accuracy(summary),
        ("evaluate",),
        printed=True,
    )
    yield Section(
        "robust_accuracy",
        "Robust accuracy (the study's Figure 4)",
        "Share of all test images that are classified correctly and survive the attack at ε (pixels in [0, 1]); bars "
        "beside the points, where images were to be proved: from the share that is proved to the share that nothing "
        "has broken." + (" Dotted: published." if len(given.published) else "") + SUSPECT,
        tables.by_eps(summary, "robust_accuracy"),
        charts.robust_curves(summary),
        ("evaluate",),
        printed=True,
    )
    yield Section(
        "attack_success",
        "Attack success rate",
        "Share of the correctly classified test images that the attack, or a search for a proof, breaks at ε "
        "(pixels in [0, 1])." + SUSPECT,
        tables.by_eps(summary, "asr"),
        steps=("evaluate",),
        printed=True,
    )


def _published(given: Material) -> Iterator[Section]:
    table = tables.beside(given.summary, given.published) if len(given.published) else pd.DataFrame()
    if len(table):
        yield Section(
            "published",
            "Beside the published figures",
            "Every number that both have, in percent; the difference is ours less the published one, in points.",
            table,
            steps=("evaluate",),
        )


def _certified(given: Material) -> Iterator[Section]:
    if given.has("certified_accuracy", "evaluate"):
        yield Section(
            "certified_accuracy",
            "Verified accuracy",
            "Between which percentages the robust accuracy at ε lies: of the images that were to be proved, the share "
            "that is classified correctly and proved robust, and the share that no attack of that radius has broken. "
            "Of several seeds, on the images that all of them share. "
            "The figure sets what is proved against accuracy, arms with augmentation outlined in black; the line joins "
            "the arms that none beats in both.",
            tables.brackets(given.summary),
            charts.pareto(given.summary),
            ("evaluate",),
            printed=True,
        )

    whole = derived.of_whole_set(given.evidence)
    if len(whole):
        yield Section(
            "certified_whole",
            "Verified accuracy on the whole test set",
            "The same of the first seed of each arm of which all test images were to be proved.",
            tables.brackets(summarise(whole)),
            steps=("evaluate",),
        )


def _claims(given: Material) -> Iterator[Section]:
    eps = derived.reference_eps(given.evidence)
    found = statistics.claims(given.evidence, eps)
    if found.empty:
        return
    yield Section(
        "claims",
        "What may be claimed",
        "Arms of which one has SupCon, augmentation or another method than normal, each trained as its profile says: "
        "in what else that differs stands beside it (epochs: of both stages together), and what differs there may "
        "be the cause as well. The difference in points of percent, its 95 % confidence interval over seeds "
        "(paired t-test), and over images (bootstrap of the mean over seeds; McNemar's exact test of the first "
        "common seed), on the images that both have. p-values are Holm's, corrected for all tests of a kind here. "
        f"Fewer than {statistics.ENOUGH} common seeds say nothing of the way of training, only of these models."
        + SUSPECT,
        statistics.claim_table(found, given.published),
        steps=("evaluate", "verify"),
    )


def _verdicts(given: Material) -> Iterator[Section]:
    if not given.has("images", "verify"):
        return
    yield Section(
        "verdicts",
        "Verdicts (the study's Table 1)",
        "Images by what was proved of them. safe-incomplete: proved by bounds alone; safe: proved by branch and bound; "
        "unsafe: a counterexample was found and checked; timeout: time, domains or memory ran out; unknown: "
        "not settled for another reason; misclassified: wrong as it stands, not verified. certified %: share of all "
        "chosen images that are classified correctly and proved robust.",
        tables.verdicts(given.summary),
        charts.verdicts(given.summary),
        ("verify",),
        printed=True,
    )
    seconds = derived.verification_seconds(given.evidence)
    if seconds["seconds"].notna().any():
        yield Section(
            "verification_times",
            "Verification time",
            "Share of the verified images that is settled (proved, or refuted) within so many seconds each.",
            drawing=charts.verification_times(seconds),
            steps=("verify",),
        )
    radii = derived.certified_radii(given.evidence)
    if len(radii):
        yield Section(
            "radius",
            "Certified radii",
            "The largest ε (pixels in [0, 1]) that could be proved for each image, by bisection; the curve is the "
            "share of the images that are classified correctly and proved robust at ε.",
            tables.radii(radii),
            charts.radius_curves(radii),
            ("verify",),
            printed=True,
        )


def _errors(given: Material) -> Iterator[Section]:
    if not given.has("accuracy", "evaluate"):
        return
    yield Section(
        "confusion",
        "What is taken for what",
        "Test images of each class by the class that the model sees in them, for every arm's first seed; the darker, "
        "the larger the share of the class.",
        drawing=charts.confusion(derived.confusion(given.evidence)),
    )
    twins = derived.most_broken(given.evidence)
    if twins is not None:
        yield Section(
            "most_broken",
            "Images most often broken",
            f"Of the images that the attacks' checks look at: those that most arms are broken on at ε "
            f"{eps_text(twins.eps)}, their adversarial twins on the most robust of these arms and what it takes them "
            "for, and the difference, enlarged for each image by itself.",
            drawing=pictures.twins(twins.images, twins.examples, twins.names, twins.found),
        )


def _trust(given: Material) -> Iterator[Section]:
    if given.has("trust/", "evaluate"):
        yield Section(
            "trust",
            "Whether the attacks can be trusted",
            "Signs of gradient masking, or of an attack that is too weak, in percent of the correctly classified "
            f"images that were probed; {tables.MARK}: more than is allowed. "
            + "; ".join(f"{check.replace('_', ' ')}: {meaning}" for check, meaning in MEANING.items())
            + ".",
            tables.trust(given.summary),
            steps=("evaluate",),
            printed=True,
        )
    if given.has("corrupted_accuracy", "evaluate"):
        yield Section(
            "corruptions",
            "Accuracy under natural corruptions",
            "Share of the test images that are classified correctly, the mean over the five strengths of each "
            "corruption (Hendrycks & Dietterich 2019).",
            tables.corruptions(given.summary),
            steps=("evaluate",),
            printed=True,
        )


def _embeddings(given: Material) -> Iterator[Section]:
    evidence = given.evidence
    if evidence.points:
        yield Section(
            "umap",
            "Embeddings with and without SupCon (the study's Figure 1)",
            "UMAP of the encoder's embeddings of test images, coloured by class; crosses are misclassified.",
            drawing=charts.umap(evidence.points, evidence.classes),
            steps=("embed",),
        )
    eps = derived.reference_eps(evidence)
    if eps is None:
        return
    known = {arm: derived.statuses(evidence, arm, eps) for arm in evidence.points | evidence.places}
    shown = {arm: f.assign(status=f["image"].map(known[arm]).fillna("open")) for arm, f in evidence.points.items()}
    if shown:
        yield Section(
            "umap_status",
            f"The same by what is known of them at ε {eps_text(eps)}",
            "proved: robust, by bounds or by branch and bound; broken: by an attack or a search; open: neither, or "
            "not tried.",
            drawing=charts.umap_status(shown),
            steps=("embed",),
        )
    points = derived.geometry(evidence, known)
    if len(points):
        certified = points[np.isfinite(points["certificate"])]
        yield Section(
            "geometry",
            "Embeddings and certificates",
            "Mean distance of unit-length embeddings to those of their class (within) and of the nearest other class "
            "(between), and margin of the logits, over the test images of every arm's first seed; ρ: Spearman's rank "
            f"correlation with the certificate ({points['kind'].iloc[0]}) over the images that were verified.",
            tables.geometry(points),
            charts.geometry(certified) if len(certified) else None,
            ("embed",),
        )


def _trainings(given: Material) -> Iterator[Section]:
    curves = derived.mean_curves(given.evidence)
    curves = curves[curves["epoch"].notna()]
    if len(curves):
        yield Section(
            "training",
            "Training curves",
            "Loss and validation metrics by epoch, means over seeds. Losses of different methods are different things.",
            drawing=charts.training_curves(curves),
        )
    commands = derived.commands(given.evidence)
    if len(commands):
        yield Section(
            "commands",
            "How to repeat it",
            "The first seed's runs, and those of seeds with which something else was done; -P seed=N gives the others. "
            "What a profile says already is left out; --env-manager local runs them in the environment at hand.",
            commands,
        )
    costs = derived.costs(given.evidence)
    if len(costs):
        yield Section(
            "costs",
            "What it costs",
            "Seconds by the clock, as the runs ended, beside whatever else the machine did; images a second of the "
            "training, or of the encoder's and of the head's.",
            tables.costs(costs),
        )


SECTIONS: tuple[Callable[[Material], Iterator[Section]], ...] = (
    *(_rates, _published, _certified, _verdicts, _claims),
    *(_trust, _errors, _embeddings, _trainings),
)
