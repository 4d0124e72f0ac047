"""Who trains: the supervisor that forms, watches and ends the worker group, and the worker it forms it of.

It computes nothing of the model. Its one invariant: one group at a time writes into a run folder, and every group has a
higher incarnation than the one before.
"""
