from rampart.evaluation.attacked import AttackPlan, evaluate
from rampart.evaluation.certified import CertificationPlan, certify
from rampart.evaluation.corrupted import CorruptionPlan, withstand
from rampart.evaluation.embedding import EmbeddingPlan, embed, geometry
from rampart.evaluation.trust import Trust, TrustPlan, sample, trust, trust_eps

__all__ = [
    "AttackPlan",
    "CertificationPlan",
    "CorruptionPlan",
    "EmbeddingPlan",
    "Trust",
    "TrustPlan",
    "certify",
    "embed",
    "evaluate",
    "geometry",
    "sample",
    "trust",
    "trust_eps",
    "withstand",
]
