"""Checkpoints of logical tensors: saved by any layout of ranks, loaded by any other, bit for bit.

Not the policy of when to save, nor what goes into `meta`. Its one invariant: a folder named `step-N` is whole, or
`verify` says which file of it is not.
"""

from .folder import find_latest, list_steps, prune, step_folder
from .load import load, load_weights
from .manifest import Manifest, read_manifest, verify
from .rng import rng_state, set_rng_state
from .save import Checkpointer

__all__ = [
    "Checkpointer",
    "Manifest",
    "find_latest",
    "list_steps",
    "load",
    "load_weights",
    "prune",
    "read_manifest",
    "rng_state",
    "set_rng_state",
    "step_folder",
    "verify",
]
