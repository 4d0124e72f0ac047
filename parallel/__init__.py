"""How a model is trained by many ranks: their layout, the engine that steps them, and their checkpoints.

It knows nothing of configuration files, of Ray or of when to save; models know nothing of it. Its one invariant: the
loss and the weights after a step do not depend on how rows, parameters and optimizer state lie on the ranks.
"""

from .backend import make_backend, make_model
from .dims import ParallelDims
from .engine import Engine
from .groups import destroy_process_group, init_process_group, process_group
from .optimizer import Fragment, OptimizerOptions

__all__ = [
    "Engine",
    "Fragment",
    "OptimizerOptions",
    "ParallelDims",
    "destroy_process_group",
    "init_process_group",
    "make_backend",
    "make_model",
    "process_group",
]
