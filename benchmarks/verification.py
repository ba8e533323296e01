"""Complete verification: images settled, time of those, domains a second.

python -m benchmarks.verification --models FILE… takes the same images in every run: the first of the test set, class by
class, that survive PGD at twice ε (the study's way of choosing). With --baseline FILE, a CSV of another verifier's
results on them (columns model, image, status, seconds, domains; status safe or unsafe where it is settled), its figures
stand beside ours and verdicts are compared; --list prints the images to give to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import pandas as pd
import torch

from benchmarks.common import Row, show
from rampart.data import load_dataset, to_pixels
from rampart.models import load_model
from rampart.settings import parse_eps
from rampart.verification import choose, verify

SETTLED = ("safe", "safe-incomplete", "unsafe")


def ours(file: str, images: list[int], dataset: str, eps: float, timeout: float) -> pd.DataFrame:
    """One row an image: model, image, status, seconds, domains."""
    model, test = load_model(file), load_dataset(dataset).test
    rows = []
    for image in images:
        found = verify(model, to_pixels(test.images[image]), int(test.labels[image]), eps, timeout)
        search = found.stage_seconds.get("branch-and-bound", 0.0)
        rows.append((Path(file).stem, image, found.status, found.seconds, found.domains, search))
        print(json.dumps(dict(zip(COLUMNS, rows[-1], strict=True))), flush=True)
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = ["model", "image", "status", "seconds", "domains", "search_seconds"]


def rows_of(name: str, found: pd.DataFrame, baseline: pd.DataFrame | None) -> list[Row]:
    """What one model's results say beside the baseline's; without one the ratio is 1."""
    other = found if baseline is None else baseline[baseline["model"] == name]
    both = found.merge(other, on="image", suffixes=("", "_other"))
    settled = both[both["status"].isin(SETTLED) & both["status_other"].isin(SETTLED)]
    contradictions = settled[settled["status"].eq("unsafe") != settled["status_other"].eq("unsafe")]
    if len(contradictions):
        raise SystemExit(f"verdicts contradict each other on images {contradictions['image'].tolist()} of {name}")
    counts = [int(frame["status"].isin(SETTLED).sum()) for frame in (found, other)]
    medians = [statistics.median(settled[column]) if len(settled) else 0.0 for column in ("seconds", "seconds_other")]
    speeds = [_speed(frame) for frame in (found, other)]
    return [
        Row(f"{name} settled of {len(found)}", "images", *map(float, counts), counts[0] / max(counts[1], 1)),
        Row(f"{name} median of images both settle", "s", *medians, medians[1] / max(medians[0], 1e-9)),
        Row(f"{name} domains", "1/s", *speeds, speeds[0] / max(speeds[1], 1e-9)),
    ]


def _speed(found: pd.DataFrame) -> float:
    """Domains a second of branch and bound; of a baseline that does not tell its time there, of all its time."""
    searched = found[found["domains"] > 0]
    column = "search_seconds" if "search_seconds" in found else "seconds"
    return float(searched["domains"].sum() / searched[column].sum()) if len(searched) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="weights (.npz, .safetensors)")
    parser.add_argument("--dataset", default="digits", help="as for the study, e.g. folder:PATH")
    parser.add_argument("--eps", default="1/255", help="radius in pixels")
    parser.add_argument("--images", type=int, default=20, help="a model")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds an image")
    parser.add_argument("--baseline", default="", help="CSV of another verifier's results")
    parser.add_argument("--list", action="store_true", help="print the images of each model and stop")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a look: 3 images, 5 seconds each")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    eps = parse_eps("eps", given.eps, "pixel")
    images, timeout = (3, 5.0) if given.quick else (given.images, given.timeout)
    test = load_dataset(given.dataset).test
    baseline = pd.read_csv(given.baseline) if given.baseline else None
    rows: list[Row] = []
    for file in given.models:
        chosen = choose(load_model(file), test, images, "survivors", 2 * eps)
        if given.list:
            print(Path(file).stem, *chosen)
            continue
        rows += rows_of(Path(file).stem, ours(file, chosen, given.dataset, eps, timeout), baseline)
    if rows:
        show(f"verification at ε {given.eps}, {timeout:g} s an image, {given.threads} threads", rows, given.json)


if __name__ == "__main__":
    main()
