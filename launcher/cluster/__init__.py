"""The machines: what this one can run (doctor), and the worker processes on it or on a Ray cluster.

It trains nothing and decides nothing about a run. Its one invariant: what was started for a run ends with the run.
"""
