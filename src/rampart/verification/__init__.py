from rampart.verification.cascade import Verdict, verify
from rampart.verification.selection import choose
from rampart.verification.split import VerificationPlan, verify_split

__all__ = ["Verdict", "VerificationPlan", "choose", "verify", "verify_split"]
