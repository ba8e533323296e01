"""Each arm's models under one name in MLflow's Model Registry, the best of them by alias."""

from __future__ import annotations

from collections.abc import Container

from rampart.arms import Arm
from rampart.reports.derived import on_common_images, reference_eps
from rampart.reports.evidence import Evidence
from rampart.tracking.models import register, registered_name

# Alias -> the metric whose largest value has it.
ALIASES = {"best-robust": "robust_accuracy", "best-certified": "certified_accuracy"}
PAPER = "paper"


def name_best(evidence: Evidence, profile: str, logged: Container[str]) -> None:
    """Registers the compared models and points each arm's aliases to the seed that is best at the reference ε; of
    profile `paper` the alias `paper`, to the first seed. The newest comparison has the last word.

    Args:
        logged: the runs that have logged a model.
    """
    eps = reference_eps(evidence)
    trained = evidence.of("train")
    trained = trained[(trained["method"] != "other") & trained["run_id"].map(lambda run: run in logged)]
    values = on_common_images(evidence)
    values = values[(values["engine"] == "native") & (values["eps"] == eps)]
    # A rate that an attack gave is not to be trusted where the attack has failed a check.
    values = values[~values["suspect"]].merge(trained[["arm", "seed", "run_id"]], on=["arm", "seed"])
    for arm, part in trained.groupby("arm", sort=False):
        first = part.iloc[0]
        name = registered_name(Arm(first["method"], bool(first["augment"]), first["contrastive"]))
        for alias, metric in ALIASES.items():
            found = values[(values["arm"] == arm) & (values["metric"] == metric)]
            # What was proved of the test set says more than what was of some images: seeds are compared in one of them.
            found = found[found["step"] == found["step"].min()].sort_values(["value", "seed"], ascending=[False, True])
            for best in found.head(1).to_dict("records"):
                said = {"metric": f"{metric}/{eps:.6g}", "value": f"{best['value']:.6g}", "run": best["run"]}
                register(best["run_id"], name, alias, said)
        if profile == PAPER:
            register(first["run_id"], name, PAPER, {"run": first["run_id"]})
