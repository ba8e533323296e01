"""Speed beside a baseline in one run: python -m benchmarks.<name> [--quick] [--json]."""
