"""The comparison: tables and figures of one profile, from the tracking server to terminal, files and one HTML page."""

from __future__ import annotations

import base64
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from rampart.evaluation.trust import MEANING
from rampart.reports import figures, tables
from rampart.reports.evidence import Evidence, collect, summarise
from rampart.settings import CompareSettings, load_profile
from rampart.tracking import Run
from rampart.tracking.queries import artifact_place

REPORT = "report.html"
SUSPECT = f" {tables.MARK}: the attack has failed a check and may have missed much."


@dataclass(frozen=True)
class Section:
    """A table, a figure, or both, with what they show."""

    name: str
    title: str
    text: str
    table: pd.DataFrame | None
    figure: Figure | None

    @property
    def image(self) -> str:
        """The figure as a PNG in base64, for the HTML page."""
        if self.figure is None:
            return ""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150)
        return base64.b64encode(buffer.getvalue()).decode()


def compare(run: Run, settings: CompareSettings) -> None:
    """Prints the tables and logs CSV, Markdown, LaTeX, PNG and report.html to `run`."""
    evidence = collect(run.experiment, settings)
    summary = summarise(evidence.values)
    chosen = sections(summary, evidence)
    for section in chosen:
        if section.table is not None:
            print(f"\n{section.title}\n{tables.markdown(tables.short_runs(section.table))}")
    for note in evidence.notes:
        print(f"note: {note}")
    with tempfile.TemporaryDirectory(prefix="rampart-") as name:
        folder = Path(name)
        evidence.values.to_csv(folder / "values.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        for section in chosen:
            _write(section, folder)
        page = html(chosen, evidence, settings, run.id)
        (folder / REPORT).write_text(page, encoding="utf-8")
        for path in sorted(folder.iterdir()):
            run.file(path)
    for section in chosen:
        plt.close(section.figure)
    run.tags({"compared": " ".join(sorted(set(evidence.values["run"])))})
    print(f"\nreport: {artifact_place(run.id, REPORT)}")


def sections(summary: pd.DataFrame, evidence: Evidence) -> list[Section]:
    """What the evidence allows to show, in the study's order."""
    found = []
    if (summary["step"] == "evaluate").any():
        found += [
            Section(
                "accuracy",
                "Accuracy (the study's Figure 3)",
                "Share of the test images that are classified correctly.",
                tables.accuracy(summary),
                figures.accuracy_bars(summary),
            ),
            Section(
                "robust_accuracy",
                "Robust accuracy (the study's Figure 4)",
                "Share of all test images that are classified correctly and survive the attack at ε (pixels in [0, 1])."
                + SUSPECT,
                tables.by_eps(summary, "robust_accuracy"),
                figures.robust_curves(summary),
            ),
            Section(
                "attack_success",
                "Attack success rate",
                "Share of the correctly classified test images that the attack, or a search for a proof, breaks at ε "
                "(pixels in [0, 1])." + SUSPECT,
                tables.by_eps(summary, "asr"),
                None,
            ),
        ]
    if summary["metric"].str.startswith("trust/").any():
        found.append(
            Section(
                "trust",
                "Whether the attacks can be trusted",
                "Signs of gradient masking, or of an attack that is too weak, in percent of the correctly classified "
                f"images that were probed; {tables.MARK}: more than is allowed. "
                + "; ".join(f"{check.replace('_', ' ')}: {meaning}" for check, meaning in MEANING.items())
                + ".",
                tables.trust(summary),
                None,
            )
        )
    if (summary["metric"] == "corrupted_accuracy").any():
        found.append(
            Section(
                "corruptions",
                "Accuracy under natural corruptions",
                "Share of the test images that are classified correctly, the mean over the five strengths of each "
                "corruption (Hendrycks & Dietterich 2019).",
                tables.corruptions(summary),
                None,
            )
        )
    if ((summary["step"] == "evaluate") & (summary["metric"] == "certified_accuracy")).any():
        found.append(
            Section(
                "certified_accuracy",
                "Verified accuracy",
                "Between which percentages the robust accuracy at ε lies: of the images that were to be proved, the "
                "share that is classified correctly and proved robust, and the share that no attack of that radius "
                "has broken.",
                tables.brackets(summary),
                None,
            )
        )
    if (summary["step"] == "verify").any():
        found.append(
            Section(
                "verdicts",
                "Verdicts (the study's Table 1)",
                "Images by what was proved of them. safe-incomplete: proved by bounds alone; safe: proved by branch "
                "and bound; unsafe: a counterexample was found and checked; timeout: branch and bound ran out of time; "
                "unknown: not settled, and not searched further; misclassified: wrong as it stands, not verified. "
                "certified %: share of all chosen images that are classified correctly and proved robust.",
                tables.verdicts(summary),
                figures.verdict_bars(summary),
            )
        )
    if len(evidence.radii):
        found.append(
            Section(
                "radius",
                "Certified radii",
                "The largest ε (pixels in [0, 1]) that could be proved for each image, by bisection; the curve is the "
                "share of the images that are classified correctly and proved robust at ε.",
                tables.radii(evidence.radii),
                figures.radius_curves(evidence.radii),
            )
        )
    if evidence.points:
        found.append(
            Section(
                "umap",
                "Embeddings with and without SupCon (the study's Figure 1)",
                "UMAP of the encoder's embeddings of test images, coloured by class; crosses are misclassified.",
                None,
                figures.umap_panels(evidence.points, evidence.classes),
            )
        )
    return found


def html(chosen: list[Section], evidence: Evidence, settings: CompareSettings, run_id: str) -> str:
    """One page that needs no other file and no network."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    return template.render(
        title=f"Rampart: profile {settings.profile}",
        about=load_profile(settings.profile)["about"],
        dataset=evidence.dataset,
        run=run_id,
        notes=evidence.notes,
        sections=chosen,
    )


def _write(section: Section, folder: Path) -> None:
    if section.figure is not None:
        section.figure.savefig(folder / f"{section.name}.png", dpi=150)
    if section.table is not None:
        section.table.to_csv(folder / f"{section.name}.csv", index=False)
        (folder / f"{section.name}.md").write_text(tables.markdown(section.table) + "\n", encoding="utf-8")
        caption = section.title
        latex = tables.latex(section.table.drop(columns="runs"), caption, f"tab:{section.name}")
        (folder / f"{section.name}.tex").write_text(latex, encoding="utf-8")
