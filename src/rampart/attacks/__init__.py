from rampart.attacks.apgd import apgd
from rampart.attacks.ball import Ball, Norm
from rampart.attacks.ensemble import MEMBERS, autoattack
from rampart.attacks.pgd import perturb, pgd
from rampart.attacks.sweep import AttackResult

__all__ = ["MEMBERS", "AttackResult", "Ball", "Norm", "apgd", "autoattack", "perturb", "pgd"]
