"""One rank: a process that trains until it is told to stop, and answers questions while it does.

Ray runs `Worker` as an actor with several threads: one trains, the others answer `reports` and `stop`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from ..config import Config
from ..training.trainer import Place, Trainer


class Worker:
    """A rank in a process of its own."""

    def __init__(self, config: Config, folder: str):
        self.config = config
        self.folder = folder
        self.stop_requested = threading.Event()
        self._reports: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def where(self, address: str | None) -> dict[str, Any]:
        """This worker's host, process and address (its node's, unless given), and a port that was free when asked."""
        import ray

        address = address or ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return {"host": socket.gethostname(), "address": address, "port": port, "pid": os.getpid()}

    def train(self, place: Place, init_from: str | None, stop_at: int | None) -> str:
        """Trains as the rank `place` names; returns "finished" or "stopped"."""
        self._log_to_file(place)
        trainer = Trainer(self.config, self.folder, place, self._report, self.stop_requested)
        return trainer.run(init_from=init_from, stop_at=stop_at)

    def reports(self) -> list[dict[str, Any]]:
        """The reports made since this was last asked."""
        with self._lock:
            taken, self._reports = self._reports, []
        return taken

    def pid(self) -> int:
        """This process's number: the answer of a process that answers."""
        return os.getpid()

    def stop(self) -> None:
        """Asks the run to save and end after the step in progress."""
        self.stop_requested.set()

    def _report(self, report: dict[str, Any]) -> None:
        with self._lock:
            self._reports.append(report)

    def _log_to_file(self, place: Place) -> None:
        """Sends this process's output to the run folder, where a person looks first."""
        path = Path(self.folder) / "logs" / f"incarnation-{place.incarnation}-rank-{place.rank}.log"
        path.parent.mkdir(exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
