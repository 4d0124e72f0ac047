"""`longscan convert`: models of transformers into run folders, and checkpoints into models of transformers.

A Llama becomes a transformer, or its linearized twin with what that adds as training would begin with it.
One tensor is in memory at a time. Invariant: everything that can be wrong with the source is said before anything is
written, and the target is whole or absent; what exists is never written over.
"""

from .converted import Converted
from .directions import convert, direction
from .folders import CARRIED_FOLDER, carry_files, new_folder
from .importing import Importing
from .linearized import check_linearizable, twin_of
from .weights import SHARD_BYTES, merged_tensor, same_bits, whole_tensor, write_checkpoint

__all__ = [
    "CARRIED_FOLDER",
    "SHARD_BYTES",
    "Converted",
    "Importing",
    "carry_files",
    "check_linearizable",
    "convert",
    "direction",
    "merged_tensor",
    "new_folder",
    "same_bits",
    "twin_of",
    "whole_tensor",
    "write_checkpoint",
]
