"""What `longscan plan --simulate` prints and draws: what more GPUs bring at each row length, and where they stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, UserError
from ..parallel.plan import RATIOS, Carry, Cluster, Ratio, Step, Study, measured_ratios, study
from .plan_report import load_of, make_table, resolved, shape_of, step_json
from .validate import replica_size

FEWEST, MOST = 8, 4096
# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072b2", "#009e73", "#b87900", "#d55e00", "#cc79a7", "#56b4e9")


@dataclass(frozen=True)
class StudyReport:
    """The best layout of each count of GPUs at each row length, and where more of them stop helping."""

    study: Study
    notes: tuple[str, ...]

    @staticmethod
    def of(
        source: str,
        overrides: Sequence[str],
        gpus: int | None,
        lengths: Sequence[int],
        cluster: Cluster,
        measured: Path | None,
        overlap: float,
    ) -> StudyReport:
        """The study of `source` on `cluster` up to `gpus`, with the ratios of the results file `measured`."""
        config, notes = resolved(source, overrides)
        ratios: Mapping[str, Ratio] = measured_ratios(measured) if measured else RATIOS
        load = dataclasses.replace(load_of(config, 0, replica_size(config)), precision="bf16")
        most = gpus or MOST
        counts = [2**power for power in range(FEWEST.bit_length() - 1, most.bit_length())]
        if not counts:
            raise ConfigError(f"--gpus is {most}; a study begins at {FEWEST} GPUs, take more")
        return StudyReport(study(load, cluster, config.batch.tokens, counts, lengths, ratios, overlap), tuple(notes))

    def to_json(self) -> dict[str, Any]:
        """By row length the steps, each with its layout and terms, and the limit."""
        found = []
        for length, steps in self.study.steps.items():
            limit = self.study.limit(length)
            found.append(
                {
                    "seq_len": length,
                    "limit": limit and {"gpus": limit[0], "term": limit[1]},
                    "steps": [
                        {**shape_of(step.load), **step_json(step), "scaling": scaling}
                        for step, scaling in zip(steps, self.study.scaling(length), strict=True)
                    ],
                }
            )
        cluster = dataclasses.asdict(self.study.cluster)
        carries = [dataclasses.asdict(carry) for carry in self.study.carries()]
        shared = {"batch_tokens": self.study.batch, "cluster": cluster, "notes": list(self.notes)}
        return {**shared, "lengths": found, "carries": carries}

    def show(self, console: Console) -> None:
        """Prints a row for each count of GPUs, and a sentence for each row length."""
        console.print(f"steps of {self.study.batch:,} tokens or one row, {self.study.cluster.gpu.name}", soft_wrap=True)
        for note in self.notes:
            console.print(note, style="yellow", soft_wrap=True, markup=False)
        for length, steps in self.study.steps.items():
            console.print(_table(length, steps, self.study.scaling(length) if steps else []))
            console.print(self._limit(length), soft_wrap=True)
        carries = self.study.carries()
        if carries:
            console.print(_carry_table(carries))

    def _limit(self, length: int) -> str:
        if not self.study.steps[length]:
            return f"no layout of rows of {length:,} fits"
        limit = self.study.limit(length)
        if limit is None:
            return f"rows of {length:,} scale to {self.study.steps[length][-1].load.dims.world_size} GPUs"
        return f"rows of {length:,} scale to {limit[0]} GPUs; beyond, {limit[1]} costs most"

    def plot(self, file: Path) -> Path:
        """Draws speed over the ideal and step time, over GPUs, a line a row length; never over a file that exists."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, 3.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for (length, steps), colour in zip(self.study.steps.items(), COLOURS, strict=False):
            gpus = [step.load.dims.world_size for step in steps]
            label = _length(length)
            style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.8, "label": label}
            left.plot(gpus, [step.mfu for step in steps], **style)
            right.plot(gpus, [step.seconds for step in steps], **style)
        for axis, title in ((left, "MFU"), (right, "seconds a step")):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
            axis.set_xlabel("GPUs")
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(color="#e6e6e6", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_ylim(bottom=0)
        right.set_yscale("log")
        right.legend(title="tokens a row", frameon=False, fontsize=8, title_fontsize=8)
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        try:
            with open(file, "xb") as output:
                output.write(buffer.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; name another file with --plot") from error
        return file


def _table(length: int, steps: Sequence[Step], scaling: Sequence[float]) -> Table:
    axes = "data x context x tensor x pipeline"
    columns = (axes, "recomputed", "step ms", "tokens/s", "MFU", "scaling", "costs most")
    table = make_table(f"GPUs, rows of {_length(length)}", *columns)
    for step, share in zip(steps, scaling, strict=True):
        dims = step.load.dims
        axes = f"{dims.data} x {dims.context} x {dims.tensor} x {dims.pipeline}"
        numbers = (f"{1e3 * step.seconds:,.0f}", f"{step.rate:,.0f}", f"{step.mfu:.2f}", f"{share:.2f}")
        table.add_row(str(dims.world_size), axes, step.load.checkpointing, *numbers, step.overhead)
    return table


def _carry_table(carries: Sequence[Carry]) -> Table:
    """How the gather of the states grows with the ranks of a row, all layers, one way; it does not with the tokens."""
    table = make_table("context ranks", "MB received", "flat ms", "by node ms")
    for carry in carries:
        times = (f"{1e3 * seconds:.2f}" for seconds in (carry.flat, carry.by_node))
        table.add_row(str(carry.ranks), f"{carry.bytes / 1e6:,.1f}", *times)
    return table


def _length(tokens: int) -> str:
    """A row length as people say it."""
    for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
