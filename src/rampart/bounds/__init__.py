from rampart.bounds.margins import ENGINES, METHODS, find_layout, margin_bounds

__all__ = ["ENGINES", "METHODS", "find_layout", "margin_bounds"]
