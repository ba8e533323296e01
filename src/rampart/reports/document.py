"""Tables in a Markdown document, computed from the evidence beside it: python -m rampart.reports.document RESULTS.md

A comment of the document says what stands below it: `<!-- table: FOLDER SECTION -->` a table of the report on the
evidence that compare has exported to a folder, `<!-- table: FILE.csv -->` a file as it is,
`<!-- table: FOLDER,FOLDER 1/255,2/255 -->` the rates of several at these ε (pixels) side by side.
"""

from __future__ import annotations

import argparse
import re
from functools import lru_cache
from pathlib import Path

import pandas as pd

from rampart.console import said_if_it_fails
from rampart.errors import SettingsError, require, unknown
from rampart.reports import tables
from rampart.reports.record import read
from rampart.reports.sections import Material, sections
from rampart.settings import parse_eps

# The comment, and the table that stands below it by now.
PLACE = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n)(?:\n(?:\|.*\n)+)?")


def filled(text: str, root: Path) -> str:
    """The document with all its tables computed anew; paths are relative to `root`.

    Raises:
        SettingsError: there is no such evidence, or no such table in it.
    """
    return PLACE.sub(lambda found: f"{found[1]}\n{tables.markdown(_table(root, found[2], found[3]))}\n", text)


def _table(root: Path, path: str, section: str | None) -> pd.DataFrame:
    if section is None:
        try:
            return pd.read_csv(root / path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise SettingsError(f"table '{path}' cannot be read: {' '.join(str(error).split())}") from error
    if "," in path:
        summaries = {Path(folder).name: _material(root / folder).summary for folder in path.split(",")}
        return tables.side_by_side(summaries, [parse_eps("ε", text, "pixel") for text in section.split(",")])
    found = _tables(root / path)
    require(section in found, unknown(f"table of {path}", section, found))
    return found[section]


@lru_cache(maxsize=8)
def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {
        section.name: tables.short_runs(section.table)
        for section in sections(_material(folder))
        if section.table is not None
    }


@lru_cache(maxsize=8)
def _material(folder: Path) -> Material:
    return read(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rampart.reports.document", description=__doc__)
    parser.add_argument("document", nargs="+", type=Path)
    documents: list[Path] = parser.parse_args().document

    def fill() -> None:
        for document in documents:
            text = filled(document.read_text(encoding="utf-8"), document.parent)
            document.write_text(text, encoding="utf-8")

    return said_if_it_fails(fill)


if __name__ == "__main__":
    raise SystemExit(main())
