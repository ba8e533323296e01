"""Complete verification: images settled, time of those, domains a second.

python -m benchmarks.verification --models FILE… takes the same images in every run: the first of the test set, class by
class, that survive PGD at twice ε (the study's way of choosing). A baseline is asked about each image right after our
engine, with the same limit, and every pair of verdicts is compared: α,β-CROWN where it is installed (`abcrown`), or our
own branch and bound without narrowing (`splits`: the parts of the ball are only split).
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn

from benchmarks.common import Row, models_of, options, show
from rampart.data import Split, load_dataset, to_pixels
from rampart.settings import parse_eps
from rampart.verification import branching, choose, verify

SETTLED = ("safe", "safe-incomplete", "unsafe")
COLUMNS = ["model", "image", "status", "seconds", "domains"]


def ask(engine: str, model: nn.Module, name: str, image: int, split: Split, eps: float, timeout: float) -> list[object]:
    """A row of COLUMNS."""
    x, label = to_pixels(split.images[image]), int(split.labels[image])
    if engine == "splits":
        with patch.object(branching, "PROBE_SHARE", math.inf):
            found = verify(model, x, label, eps, timeout)
    else:
        found = verify(model, x, label, eps, timeout, engine=engine)
    row = [name, image, found.status, round(found.seconds, 3), found.domains]
    print(json.dumps({"engine": engine, **dict(zip(COLUMNS, row, strict=True))}), flush=True)
    return row


def rows_of(name: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Row]:
    """What one model's results say beside the baseline's."""
    both = ours.merge(theirs, on="image", suffixes=("", "_other"))
    settled = both[both["status"].isin(SETTLED) & both["status_other"].isin(SETTLED)]
    contradictions = settled[settled["status"].eq("unsafe") != settled["status_other"].eq("unsafe")]
    if len(contradictions):
        raise SystemExit(f"verdicts contradict each other on images {contradictions['image'].tolist()} of {name}")
    frames = (ours, theirs)
    mine, other = (float(frame["status"].isin(SETTLED).sum()) for frame in frames)
    rows = [Row(f"{name} settled of {len(ours)}", "images", mine, other, mine / max(other, 1))]
    mine, other = (statistics.median(settled[c]) if len(settled) else 0.0 for c in ("seconds", "seconds_other"))
    rows.append(Row(f"{name} median of images both settle", "s", mine, other, other / max(mine, 1e-9)))
    mine, other = map(_speed, frames)
    return [*rows, Row(f"{name} domains", "1/s", mine, other, mine / max(other, 1e-9))]


def _speed(found: pd.DataFrame) -> float:
    """Domains a second of all that was spent on images that came to branch and bound."""
    searched = found[found["domains"] > 0]
    return float(searched["domains"].sum() / searched["seconds"].sum()) if len(searched) else 0.0


def main() -> None:
    parser = options(__doc__, quick="3 images, 5 seconds each")
    parser.add_argument("--models", nargs="+", default=[], help="files; none: one that is trained on the images")
    parser.add_argument("--dataset", default="digits", help="as for the study, e.g. folder:PATH")
    parser.add_argument("--eps", default="1/255", help="radius in pixels")
    parser.add_argument("--images", type=int, default=20, help="a model")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds an image")
    beside = "splits" if importlib.util.find_spec("abcrown") is None else "abcrown"
    parser.add_argument("--beside", choices=["abcrown", "splits"], default=beside, help="the baseline")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    eps = parse_eps("eps", given.eps, "pixel")
    images, timeout = (3, 5.0) if given.quick else (given.images, given.timeout)
    data = load_dataset(given.dataset)
    test = data.test
    engines = ["native", given.beside]
    asked = f"beside {given.beside} at ε {given.eps}, {timeout:g} s an image, {given.threads} threads"
    rows: list[Row] = []
    for name, model in models_of(given.models, data).items():
        found: dict[str, list[list[object]]] = {engine: [] for engine in engines}
        for image in choose(model, test, images, "survivors", 2 * eps):
            for engine in engines:
                found[engine].append(ask(engine, model, name, image, test, eps, timeout))
        frames = [pd.DataFrame(found[engine], columns=COLUMNS) for engine in engines]
        rows += rows_of(name, *frames)
        show(f"{name}, {asked}", rows[-3:], as_json=False)
    show(f"verification, {asked}", rows, given.json)


if __name__ == "__main__":
    main()
