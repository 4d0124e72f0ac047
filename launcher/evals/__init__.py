"""Evaluations of trained models: what is measured, what stands beside it, and how it is shown.

They train nothing and write nothing but their results. Invariant: every number of one table was taken on the same text.
"""

__all__: list[str] = []
