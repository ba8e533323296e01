from rampart.tracking.lifecycle import open_run
from rampart.tracking.models import fetch_model, source_of
from rampart.tracking.runs import Run
from rampart.tracking.store import initialise, sweep

__all__ = ["Run", "fetch_model", "initialise", "open_run", "source_of", "sweep"]
