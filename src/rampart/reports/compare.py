"""The comparison: tables and figures of one profile, from the tracking server to terminal, files and one HTML page."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jinja2
import pandas as pd

from rampart.errors import RampartError
from rampart.reports import tables
from rampart.reports.baseline import put_beside, read_baseline
from rampart.reports.drawing import Panels, save, script
from rampart.reports.evidence import Evidence
from rampart.reports.joining import gathered
from rampart.reports.record import keep
from rampart.reports.registry import name_best
from rampart.reports.sections import Section, material_of, sections
from rampart.settings import CompareSettings, Settings, load_profile
from rampart.tracking import Run
from rampart.tracking.queries import artifact_place, find_models, run_page
from rampart.tracking.ui import MOST

log = logging.getLogger(__name__)

REPORT = "report.html"
# Characters of a description; MLflow cuts what is longer than 8000.
ROOM = 6500


def run_comparison(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    """Prints the main tables and logs all as CSV, Markdown, LaTeX, PNG and PDF, and report.html, to `run`; gives the
    arms' best models their aliases in the Model Registry.

    Raises:
        RampartError: there is nothing to compare, or it contradicts itself, or the baseline cannot be read.
    """
    assert isinstance(settings, CompareSettings)
    run.name(f"compare {settings.profile}")
    baseline, said = read_baseline(settings.baseline) if settings.baseline else (None, [])
    evidence, published = gathered(run.experiment, settings)
    if baseline is not None:
        published, more = put_beside(baseline, set(evidence.values["method"]))
        said += more
    evidence.notes.extend(said)
    material = material_of(evidence, published)
    if settings.export:
        keep(material, Path(settings.export))
    chosen = sections(material)
    for section in chosen:
        if section.table is not None and section.printed:
            print(f"\n{section.title}\n{tables.markdown(tables.short_runs(section.table))}")
    for note in evidence.notes:
        print(f"note: {f'{note.step}: ' if note.step else ''}{note.text}")
    with tempfile.TemporaryDirectory(prefix="rampart-") as name:
        folder = Path(name)
        evidence.values.to_csv(folder / "values.csv", index=False)
        material.summary.to_csv(folder / "summary.csv", index=False)
        save({section.name: section.drawing for section in chosen if section.drawing}, folder)
        for section in chosen:
            if section.table is not None:
                _write(section.name, section.title, section.table, folder)
        (folder / REPORT).write_text(page(chosen, evidence, settings, run, folder), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            run.file(path)
        for section in chosen if settings.export else ():
            if section.printed and section.drawing:
                shutil.copy(folder / f"{section.name}.png", settings.export)
    models = find_models(run.experiment).set_index("run_id")["model_id"]
    run.uses(models[models.index.isin(evidence.of("train")["run_id"])])
    run.describe(_description(run, chosen))
    # What `make ui` leads to: runs of this store.
    ours = evidence.of("evaluate", "verify").dropna(subset="experiment_id")
    arms = ours[ours["step"] == ours["step"].min()].drop_duplicates(["arm", "engine"])
    if len(arms):
        run.tags({"arms": " ".join(arms["run_id"][:MOST])})
    print(f"\nreport: {artifact_place(run.id, REPORT)}")
    try:
        name_best(evidence, settings.profile, set(models.index))
    except RampartError as error:  # the names are whoever's who compared first
        log.warning("the report stands, but the models have no names in the Model Registry: %s", error)


def page(chosen: list[Section], evidence: Evidence, settings: CompareSettings, run: Run, folder: Path) -> str:
    """One page that needs no other file and no network; the pictures that it takes in lie in `folder`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("report.html.j2")
    tabled = {step for section in chosen if section.table is not None for step in section.steps}
    specs, images = {}, {}
    for section in chosen:
        if isinstance(section.drawing, Panels):
            # `</script>` in a label would end the page's script.
            specs[section.name] = json.dumps(section.drawing.specs).replace("<", "\\u003c")
        elif section.drawing:
            images[section.name] = base64.b64encode((folder / f"{section.name}.png").read_bytes()).decode()
    return template.render(
        title=f"Rampart: profile {settings.profile}",
        about=load_profile(settings.profile)["about"] or "",
        dataset=evidence.dataset,
        splits=evidence.splits,
        run=run.id,
        # Those of a step stand below its tables; where it has none, with the others.
        notes=[note for note in evidence.notes if note.step not in tabled],
        notes_of=lambda section: [note for note in evidence.notes if note.step in section.steps],
        sections=chosen,
        specs=specs,
        images=images,
        script=script() if specs else "",
        words=tables.WORDS,
        address=lambda run_id: run_page(run.experiment, run_id),
        # Of other stores' runs this one has no page.
        others=[Path(place).name for place in settings.evidence],
        here=set(evidence.runs.dropna(subset="experiment_id")["run_id"]),
    )


def _description(run: Run, chosen: list[Section]) -> str:
    """The printed tables, as many as there is room for, and their pictures."""
    parts = [f"The whole report: `{REPORT}` among the artifacts."]
    for section in chosen:
        if section.printed and section.table is not None:
            table = tables.markdown(section.table.drop(columns="runs"))
            pictured = run.shown(f"{section.name}.png") if section.drawing else ""
            long = len("".join(parts)) + len(table) > ROOM
            parts.append("\n\n".join([f"### {section.title}", *([] if long else [table]), pictured]))
    return "\n\n".join(parts)


def _write(name: str, title: str, table: pd.DataFrame, folder: Path) -> None:
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.md").write_text(tables.markdown(table) + "\n", encoding="utf-8")
    latex = tables.latex(table.drop(columns="runs"), title, f"tab:{name}")
    (folder / f"{name}.tex").write_text(latex, encoding="utf-8")
