"""Rampart: which way of training a CNN makes it robust? Train, attack, prove, compare; every number a tracked run."""

import os

__version__ = "0.1.0"

# MLflow reads this when it is imported, which some module of ours does first.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
