"""Ray: the worker processes of a run, on this machine or on a cluster that is already up."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UserError
from ..config import Config
from ..elastic.worker import Worker
from ..validate import worker_count

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

LOOPBACK = "127.0.0.1"
# glibc hands large freed blocks back to the kernel, and the page faults of taking them again cost the CPU path 10 to
# 25% at 512 tokens a row and half its time at 32K.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
ANSWER_SECONDS = 10.0
# A process that is alive answers in far less, whatever it computes.
PING_SECONDS = 15.0
CONNECT_SECONDS = 10.0
OBJECT_STORE_BYTES = 128 * 2**20


class RayCluster:
    """A connection to Ray for the length of one run.

    Without `RAY_ADDRESS` in the environment a private Ray is started on the loopback address and ended with the run.
    With it, the run joins that cluster, takes only what it asks for, and leaves the cluster as it was.
    """

    def __init__(self, config: Config):
        self.config = config
        self.count = worker_count(config)
        self.uses_gpus = False
        self.workers: list[Any] = []
        self._asked: Any = None

    def __enter__(self) -> RayCluster:
        import ray

        address = os.environ.get("RAY_ADDRESS")
        _check_reachable(address)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                with _children_in_groups_of_their_own():
                    ray.init(
                        address="local",
                        num_cpus=max(self.count, os.cpu_count() or 1),
                        include_dashboard=False,
                        object_store_memory=OBJECT_STORE_BYTES,
                        _node_ip_address=LOOPBACK,
                        **quiet,
                    )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray"
            hint = "A cluster that asks for a token needs RAY_AUTH_MODE=token here; " if address else ""
            raise UserError(
                f"cannot reach {where}: {_first_line(error)}. {hint}`longscan doctor` shows what is running."
            ) from error
        self._check_resources(ray.cluster_resources(), address)
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        ray.shutdown()

    def _check_resources(self, resources: Mapping[str, float], address: str | None) -> None:
        """Refuses a cluster that can never hold the workers; decides whether each takes a GPU."""
        device = self.config.run.device
        self.uses_gpus = device == "cuda" or (device == "auto" and resources.get("GPU", 0) >= 1)
        name = "GPU" if self.uses_gpus else "CPU"
        have = int(resources.get(name, 0))
        if have < self.count:
            where = f"the Ray cluster at {address}" if address else "this machine"
            remedy = f"set run.workers={have}" if have else "set run.device=cpu"
            raise ConfigError(
                f"{self.count} workers need a {name} each and {where} has {have}; {remedy}, or add nodes."
            )

    def form(self, folder: Path, incarnation: int) -> tuple[list[Any], list[dict[str, Any]]]:
        """Starts one actor a rank; returns the actors and where each stands."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        timeout = self.config.run.timeout_seconds
        actor = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=int(self.uses_gpus),
            max_concurrency=4,
            runtime_env={"env_vars": worker_environment(self.config, self.count)},
        )
        self.workers = [actor.remote(self.config, str(folder.resolve())) for _ in range(self.count)]
        try:
            address = None if os.environ.get("RAY_ADDRESS") else LOOPBACK
            places = ray.get([worker.where.remote(address) for worker in self.workers], timeout=timeout)
        except GetTimeoutError as error:
            raise UserError(
                f"Ray could not place {self.count} workers in {timeout:.0f} s; something else holds the cluster's "
                "CPUs or GPUs. Lower run.workers, or wait for it to end."
            ) from error
        except RayError as error:
            raise UserError(f"a worker could not start: {_first_line(error)}") from error
        return self.workers, [{"rank": rank, **place} for rank, place in enumerate(places)]

    def poll(self, runs: list[Any], seconds: float) -> tuple[dict[int, str], dict[int, Exception]]:
        """Waits up to `seconds`; returns what ended ranks returned, and what failed ranks raised."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, _ = ray.wait(runs, num_returns=len(runs), timeout=seconds)
        ended: dict[int, str] = {}
        failures: dict[int, Exception] = {}
        for reference in done:
            rank = runs.index(reference)
            try:
                ended[rank] = ray.get(reference)
            except RayTaskError as error:
                failures[rank] = error.cause if isinstance(error.cause, Exception) else error
            except RayError as error:
                failures[rank] = error
        return ended, failures

    def ask(self, call: Callable[[], Any], default: Any) -> Any:
        """A worker's answer, maybe to what was asked before; `default` while there is none.

        Nor is there one once the worker is gone: its run reports the reason.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        self._asked = self._asked or call()
        try:
            answer = ray.get(self._asked, timeout=ANSWER_SECONDS)
        except GetTimeoutError:
            return default
        except RayError:
            answer = default
        self._asked = None
        return answer

    def silent(self, ranks: Iterable[int]) -> set[int]:
        """Which of these ranks' processes do not even answer: stopped, or their machine is gone."""
        import ray

        pings = {self.workers[rank].pid.remote(): rank for rank in ranks}
        _, pending = ray.wait(list(pings), num_returns=len(pings), timeout=PING_SECONDS) if pings else ([], [])
        return {pings[ping] for ping in pending}


_starts_ray = threading.Event()
os.register_at_fork(after_in_child=lambda: os.setpgrp() if _starts_ray.is_set() else None)


@contextmanager
def _children_in_groups_of_their_own() -> Iterator[None]:
    """A `with` block whose subprocesses do not get the signals that are sent to this one's process group.

    A terminal and many schedulers signal the group, and the run that is to save needs its Ray. Ray starts its processes
    with a `preexec_fn`, so that what is registered for a fork runs in them.
    """
    _starts_ray.set()
    try:
        yield
    finally:
        _starts_ray.clear()


def _check_reachable(address: str | None) -> None:
    """Raises UserError at once where nothing listens at a `host:port`; Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot reach the Ray cluster at RAY_ADDRESS={address}: {error}. Start it with `ray start --head`, or "
            "unset RAY_ADDRESS to train on this machine alone."
        ) from error


def worker_environment(config: Config, workers: int) -> dict[str, str]:
    """The environment every worker starts with."""
    threads = config.run.threads or max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **KEEP_MEMORY}
    if config.run.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return environment


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
