from rampart.attacks.pgd import AttackResult, pgd, perturb

__all__ = ["AttackResult", "perturb", "pgd"]
