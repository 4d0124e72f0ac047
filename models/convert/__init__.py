"""Published models as ours and back: which field of their config and which tensor is which here.

Not a copy of anybody's model, and nothing is computed but reshapes and the norms' offset. One invariant: a model
converted and converted back is the same bytes.
"""

from .card import model_card
from .checks import check_tensors, family_named, family_of
from .family import Family, Link, essence, parameter_shapes
from .files import SINGLE, Entry, Weights, Written, read_json, shards, write_file, write_json, write_model, write_text

__all__ = [
    "SINGLE",
    "Entry",
    "Family",
    "Link",
    "Weights",
    "Written",
    "check_tensors",
    "essence",
    "family_named",
    "family_of",
    "model_card",
    "parameter_shapes",
    "read_json",
    "shards",
    "write_file",
    "write_json",
    "write_model",
    "write_text",
]
