from rampart.bounds.margins import ENGINES, METHODS, margin_bounds

__all__ = ["ENGINES", "METHODS", "margin_bounds"]
