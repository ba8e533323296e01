from rampart.evaluation.attacked import AttackPlan, evaluate
from rampart.evaluation.embedding import EmbeddingPlan, embed

__all__ = ["AttackPlan", "EmbeddingPlan", "embed", "evaluate"]
