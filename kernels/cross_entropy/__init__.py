"""Cross entropy of a linear layer, hidden states to loss in chunks; the N x V logits never exist at once."""

from .op import linear_cross_entropy, loss_from_pieces, vocabulary_pieces

__all__ = ["linear_cross_entropy", "loss_from_pieces", "vocabulary_pieces"]
