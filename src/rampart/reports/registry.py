"""Each arm's models under one name in MLflow's Model Registry, the best of them by alias."""

from __future__ import annotations

from rampart.arms import Arm
from rampart.reports.derived import reference_eps
from rampart.reports.evidence import Evidence
from rampart.tracking.models import register, registered_name

# Alias -> the metric whose largest value has it.
ALIASES = {"best-robust": "robust_accuracy", "best-certified": "certified_accuracy"}
PAPER = "paper"


def name_best(evidence: Evidence, profile: str) -> None:
    """Registers the compared models and points each arm's aliases to the seed that is best at the reference ε; of
    profile `paper` the alias `paper`, to the first seed."""
    eps = reference_eps(evidence)
    trained = evidence.of("train").set_index(["arm", "seed"])
    values = evidence.values[(evidence.values["engine"] == "native") & (evidence.values["eps"] == eps)]
    for arm, part in evidence.of("train").groupby("arm", sort=False):
        first = part.iloc[0]
        name = registered_name(Arm(first["method"], bool(first["augment"]), first["contrastive"]))
        # A rate that an attack gave is not to be trusted where the attack has failed a check.
        for alias, metric in ALIASES.items():
            found = values[(values["arm"] == arm) & (values["metric"] == metric) & ~values["suspect"]]
            found = found[[(arm, seed) in trained.index for seed in found["seed"]]]
            if len(found):
                best = found.sort_values(["value", "seed"], ascending=[False, True]).iloc[0]
                said = {"metric": f"{metric}/{eps:.6g}", "value": f"{best['value']:.6g}", "run": str(best["run"])}
                register(str(trained.loc[(arm, best["seed"]), "run_id"]), name, alias, said)
        if profile == PAPER:
            register(str(first["run_id"]), name, PAPER, {"run": str(first["run_id"])})
