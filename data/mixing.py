"""Which corpus each row of a stage comes from: a fixed pattern of slots, repeated, so that any row is found at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ConfigError

SLOTS = 4096


@dataclass(frozen=True)
class Mixture:
    """How many of every 4096 rows each corpus gives."""

    counts: tuple[int, ...]

    @staticmethod
    def of(weights: tuple[float, ...], what: str) -> Mixture:
        """Shares the slots by largest remainder; raises ConfigError for a positive weight too small for a slot."""
        total = sum(weights)
        if not all(np.isfinite(weight) and weight >= 0 for weight in weights) or not total > 0:
            raise ConfigError(f"{what} are {list(weights)}; give a positive number for each corpus.")
        shares = [weight / total * SLOTS for weight in weights]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda corpus: counts[corpus] - shares[corpus])
        for corpus in by_remainder[: SLOTS - sum(counts)]:
            counts[corpus] += 1
        for corpus, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            if weight > 0 and count == 0:
                raise ConfigError(
                    f"{what}: {weight} for corpus {corpus} is {weight / total:.2e} of all, less than one row in "
                    f"{SLOTS}. Raise it or leave the corpus out."
                )
        return Mixture(tuple(counts))

    @cached_property
    def pattern(self) -> np.ndarray:
        """int64 [4096]: the corpus of each slot, so that any prefix holds within one row of each corpus's share.

        Tijdeman's rule (The chairman assignment problem, 1980): of the corpora whose next row is due, the one with the
        earliest deadline. For n corpora no prefix deviates by more than 1 - 1/(2n - 2).
        """
        active = np.flatnonzero(self.counts)
        if len(active) == 1:
            return np.full(SLOTS, active[0])
        counts, slack = np.array(self.counts)[active], 2 * len(active) - 2
        taken = np.zeros(len(active), np.int64)
        pattern = np.empty(SLOTS, np.int64)
        for slot in range(SLOTS):
            due = slack * (counts * (slot + 1) - SLOTS * taken) >= SLOTS
            deadlines = ((taken + 1) * slack - 1) / counts
            chosen = int(np.where(due, deadlines, np.inf).argmin())
            taken[chosen] += 1
            pattern[slot] = active[chosen]
        return pattern

    @cached_property
    def _before(self) -> np.ndarray:
        """int64 [4097, corpora]: how many of the first n slots each corpus has."""
        taken = self.pattern[:, None] == np.arange(len(self.counts))
        return np.concatenate([np.zeros((1, len(self.counts)), np.int64), np.cumsum(taken, axis=0)])

    def locate(self, row: int) -> tuple[int, int]:
        """The corpus of a row of the stage, and how many rows before it are of this corpus."""
        corpus = int(self.pattern[row % SLOTS])
        return corpus, self.rows(corpus, row)

    def rows(self, corpus: int, rows: int) -> int:
        """How many of the stage's first `rows` rows come from the corpus."""
        blocks, slots = divmod(rows, SLOTS)
        return blocks * self.counts[corpus] + int(self._before[slots, corpus])
