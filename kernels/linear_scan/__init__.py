"""The diagonal linear scan, forward, backward and summarised; not its gates, which are the callers'."""

from .op import linear_scan, linear_scan_summarize

__all__ = ["linear_scan", "linear_scan_summarize"]
