"""The training loop and what it needs: schedule, rows, guard, metrics, progress.

It starts no process and knows no Ray. Its one invariant: which rows, rates and bits a step has follows from the
configuration and the checkpoint alone.
"""
