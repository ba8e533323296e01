from rampart.attacks.pgd import AttackResult, perturb, pgd

__all__ = ["AttackResult", "perturb", "pgd"]
