"""Cross entropy of a linear layer, hidden states to loss, a chunk of the logits at a time."""

from .op import linear_cross_entropy, loss_from_pieces, vocabulary_pieces

__all__ = ["linear_cross_entropy", "loss_from_pieces", "vocabulary_pieces"]
