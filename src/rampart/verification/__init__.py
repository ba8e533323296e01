from rampart.verification.cascade import verify
from rampart.verification.selection import choose
from rampart.verification.split import Progress, VerificationPlan, verify_split
from rampart.verification.verdict import Verdict

__all__ = ["Progress", "Verdict", "VerificationPlan", "choose", "verify", "verify_split"]
