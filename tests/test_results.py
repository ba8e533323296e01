"""RESULTS.md says of profile `paper` what the ledgers in results/ say: python -m tests.test_results prints it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from rampart.ledger import attack_rates, eps_key

ROOT = Path(__file__).parents[1]
# The study's radii, on its scale, and in pixels.
RADII = {f"{k}/255": k / 510 for k in (1, 2, 4, 8, 16)}


def table() -> str:
    """A row an arm and seed: accuracy, and attack success at the study's radii, in percent."""
    rows = []
    for run in pd.read_csv(ROOT / "results" / "runs.csv").to_dict("records"):
        rates = attack_rates(
            pd.read_parquet(ROOT / "results" / run["profile"] / f"{run['arm']}-s{run['seed']}.parquet")
        )
        shown = [rates["accuracy"], *(rates[f"asr/{eps_key(eps)}"] for eps in RADII.values())]
        runs = f"{run['training'][:8]}, {run['evaluation'][:8]}"
        rows.append([run["arm"], run["seed"], *(f"{100 * share:.2f}" for share in shown), runs])
    columns = ["arm", "seed", "accuracy", *(f"ASR {radius}" for radius in RADII), "runs"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def test_results_say_what_the_ledgers_say() -> None:
    assert table() in (ROOT / "RESULTS.md").read_text()


if __name__ == "__main__":
    print(table())
