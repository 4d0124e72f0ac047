"""A run on paper, before anything starts: the bytes of its ranks, the time of its steps, and what more GPUs bring.

It builds no model and joins no process group. Its one invariant: it knows of a layout what `ParallelDims` knows, and
formulas that tests or measurements can contradict for the rest.
"""

from .layout import Plan, Remedy
from .load import Load
from .machine import GIB, GPUS, Cluster, Gpu, find_gpu
from .memory import Memory, as_mapping, memory
from .recorded import errors, load_named, work_name
from .simulate import Step, simulate
from .study import Carry, Study, study
from .work import RATIOS, Ratio, measured_ratios

__all__ = [
    "GIB",
    "GPUS",
    "RATIOS",
    "Carry",
    "Cluster",
    "Gpu",
    "Load",
    "Memory",
    "Plan",
    "Ratio",
    "Remedy",
    "Step",
    "Study",
    "as_mapping",
    "errors",
    "find_gpu",
    "load_named",
    "measured_ratios",
    "memory",
    "simulate",
    "study",
    "work_name",
]
