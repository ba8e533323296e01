from rampart.study.steps import run_step

__all__ = ["run_step"]
