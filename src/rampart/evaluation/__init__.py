from rampart.evaluation.attacked import AttackPlan, evaluate
from rampart.evaluation.certified import CertificationPlan, certify
from rampart.evaluation.embedding import EmbeddingPlan, embed

__all__ = ["AttackPlan", "CertificationPlan", "EmbeddingPlan", "certify", "embed", "evaluate"]
