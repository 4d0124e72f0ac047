"""One module a claim: `python -m benchmarks.<name>` from the repository's root measures it and records the figures.

No library code and no tests. Each figure is a JSON object a line in `results/`, with machine, versions and commit.
"""
