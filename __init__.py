"""longscan: pretraining of long-context language models whose sequence mixers are linear scans.

The repository root is this package. `kernels` and `data` are leaves, `models` builds on `kernels`, `parallel` on
both, `launcher` on everything. Importing `longscan` imports none of them.
"""

__version__ = "0.1.0"
