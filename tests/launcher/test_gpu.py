"""The same trainer on a GPU: bf16 with fp32 masters, Triton kernels, NCCL, inline and under Ray."""

import pytest
import torch

from longscan.launcher.elastic.supervisor import train
from longscan.launcher.run_folder import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def records(config) -> list[dict]:
    return RunFolder.open(config.run.folder).metrics.standing()


def test_a_run_on_a_gpu_learns_as_on_a_cpu(tiny):
    # DeepSpeed serves one kind of device a process, so this compares stage 0.
    gpu, cpu = tiny("run.device=cuda", "parallel.zero=0", run="gpu"), tiny("parallel.zero=0", run="cpu")
    assert train(gpu).status == train(cpu).status == "finished"
    pairs = zip(records(gpu), records(cpu), strict=True)
    assert all(abs(a["loss"] - b["loss"]) < 0.03 * b["loss"] for a, b in pairs)
    assert records(gpu)[-1]["memory_bytes"] > 0


def test_a_run_on_a_gpu_resumes_bit_for_bit_under_ray_with_nccl(tiny):
    ray = ("run.device=cuda", "run.launcher=ray", "run.workers=1", "run.deterministic=true")
    whole, parts = tiny(*ray, run="whole"), tiny(*ray, run="parts")
    train(whole)
    train(parts, stop_at=7)
    train(parts)
    assert [record["loss"] for record in records(parts)] == [record["loss"] for record in records(whole)]


@pytest.mark.parametrize("options", [(), ("stages=[{seq_len: 32, tokens: 6144}, {seq_len: 128, tokens: 6144}]",)])
def test_a_run_with_cuda_graphs_is_the_run_without(tiny, options):
    options = ("run.device=cuda", "parallel.zero=0", "validation.every=2", "checkpoint.every=2", *options)
    eager, graphed = tiny(*options, run="eager"), tiny(*options, "run.cuda_graphs=true", run="graphed")
    train(graphed, stop_at=3)
    assert train(eager).status == train(graphed).status == "finished"
    assert [record["loss"] for record in records(graphed)] == [record["loss"] for record in records(eager)]
