"""How the kernels of linear attention cut rows into pieces, for them and for who counts the states that they keep."""

from __future__ import annotations

from ..sizes import cdiv

# Programs of a walk that 132 SMs run at once, of 4 warps with 167 to 255 registers; and so many that cutting rows no
# longer pays for the second reading.
PROGRAMS, ENOUGH = 264, 128
# Pieces are whole multiples of it.
UNIT = 128


def cut_rows(tokens: int, rows: int, value_dim: int, grouped: bool) -> tuple[int, int]:
    """(pieces, tokens a span) of the rows of all heads: a piece a span, and with groups one more."""
    programs, units = rows * cdiv(value_dim, 64), cdiv(tokens, UNIT)
    spans = 1 if programs >= ENOUGH else min(units, max(1, PROGRAMS // programs))
    span = cdiv(units, spans)
    return cdiv(units, span) + grouped, span * UNIT
