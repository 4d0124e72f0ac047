"""Ray: the worker processes of a run, on this machine or on a cluster that is already up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UserError
from ..config import Config
from ..elastic.worker import Worker

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

ANSWER_SECONDS = 60.0
OBJECT_STORE_BYTES = 128 * 2**20


class RayCluster:
    """A connection to Ray for the length of one run.

    Without `RAY_ADDRESS` in the environment a private Ray is started on the loopback address and ended with the run.
    With it, the run joins that cluster, takes only what it asks for, and leaves the cluster as it was.
    """

    def __init__(self, config: Config):
        self.config = config
        self.workers: list[Any] = []

    def __enter__(self) -> RayCluster:
        import ray

        address = os.environ.get("RAY_ADDRESS")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    address="local",
                    num_cpus=max(self.config.run.workers, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray"
            raise UserError(
                f"cannot reach {where}: {_first_line(error)}. `longscan doctor` shows what is running."
            ) from error
        self._check_resources(ray.cluster_resources(), address)
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        ray.shutdown()

    def _check_resources(self, resources: dict[str, float], address: str | None) -> None:
        run = self.config.run
        need = {"GPU": run.workers} if run.device == "cuda" else {"CPU": run.workers}
        for name, count in need.items():
            have = int(resources.get(name, 0))
            if have < count:
                where = f"the Ray cluster at {address}" if address else "this machine"
                raise ConfigError(
                    f"{count} workers need {count} {name}s and {where} has {have}. "
                    f"Set run.workers={have or 1}, or add nodes."
                )

    def form(self, folder: Path, incarnation: int) -> tuple[list[Any], list[dict[str, Any]]]:
        """Starts one actor a rank; returns the actors and where each stands."""
        import ray

        run = self.config.run
        options: dict[str, Any] = {"num_cpus": 1, "max_concurrency": 4}
        if run.device == "cuda":
            options["num_gpus"] = 1
        options["runtime_env"] = {"env_vars": worker_environment(self.config)}
        actor = ray.remote(Worker).options(**options)
        self.workers = [actor.remote(self.config, str(folder.resolve())) for _ in range(run.workers)]
        try:
            places = ray.get([worker.where.remote() for worker in self.workers], timeout=run.timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"Ray could not place {run.workers} workers in {run.timeout_seconds:.0f} s; something else holds the "
                "cluster's CPUs or GPUs. Lower run.workers, or wait for it to end."
            ) from error
        except ray.exceptions.RayError as error:
            raise UserError(f"a worker could not start: {_first_line(error)}") from error
        return self.workers, [{"rank": rank, **place} for rank, place in enumerate(places)]

    def poll(self, runs: list[Any], seconds: float) -> tuple[dict[int, str], dict[int, Exception]]:
        """Waits up to `seconds`; returns what ended ranks returned, and what failed ranks raised."""
        import ray

        done, _ = ray.wait(runs, num_returns=len(runs), timeout=seconds)
        ended: dict[int, str] = {}
        failures: dict[int, Exception] = {}
        for reference in done:
            rank = runs.index(reference)
            try:
                ended[rank] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failures[rank] = error.cause if isinstance(error.cause, Exception) else error
            except ray.exceptions.RayError as error:
                failures[rank] = error
        return ended, failures

    def ask(self, call: Callable[[], Any], default: Any) -> Any:
        """A worker's answer; `default` when it is no longer there (its run reports the reason)."""
        import ray

        try:
            return ray.get(call(), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return default


def worker_environment(config: Config) -> dict[str, str]:
    """The environment every worker starts with."""
    environment = {"OMP_NUM_THREADS": str(config.run.threads), "TOKENIZERS_PARALLELISM": "false"}
    if config.run.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return environment


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
