"""Layouts on paper: who stands where, what fits, and what would make it fit."""

import pytest

from longscan.errors import ConfigError
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import ParallelDims
from longscan.parallel.plan import GIB, GPUS, Cluster, Load, Plan, find_gpu
from longscan.parallel.plan.layout import Place

NO_ZERO = ParallelDims(zero=0)


def plan_of(preset="griffin-1.3b", dims=None, seq_len=8192, gpu="h100", **fields):
    model = config_from_mapping({**load_preset(preset), "vocab_size": 32000})
    return Plan(Load(model, dims or ParallelDims(), seq_len, **fields), Cluster(GPUS[gpu]))


def test_ranks_of_a_replica_are_consecutive():
    places = plan_of(dims=ParallelDims(data=2, context=2, tensor=2, pipeline=2)).places()
    assert places[0] == Place(0, data=0, pipeline=0, context=0, tensor=0)
    assert places[1] == Place(1, data=0, pipeline=0, context=0, tensor=1)
    assert places[2] == Place(2, data=0, pipeline=0, context=1, tensor=0)
    assert places[4] == Place(4, data=0, pipeline=1, context=0, tensor=0)
    assert places[8] == Place(8, data=1, pipeline=0, context=0, tensor=0)
    assert len({(p.data, p.pipeline, p.context, p.tensor) for p in places}) == len(places) == 16


def test_every_layer_is_held_once():
    plan = plan_of(dims=ParallelDims(pipeline=5))
    held = [layer for stage in range(5) for run in plan.layers(stage) for layer in run]
    assert sorted(held) == list(range(24))


def test_1_3b_takes_16_bytes_a_parameter_and_more():
    plan = plan_of(seq_len=2048)
    (held,) = plan.stages
    params = 1_308_477_440
    # bf16 and its gradient in fp32, masters and both moments: 18 bytes a parameter.
    assert held.parameters + held.gradients + held.optimizer == 18 * params
    assert plan.fits


def test_a_layout_that_does_not_fit_names_some_that_do():
    plan = plan_of(seq_len=32768)
    assert not plan.fits
    remedies = plan.remedies()
    assert remedies
    for remedy in remedies:
        changed = Plan(remedy.load, plan.cluster)
        assert changed.fits and changed.largest == remedy.total
        assert remedy.load.dims.world_size == 1, "a nearer remedy needs no more GPUs"
    rates = [remedy.rate for remedy in remedies]
    assert rates == sorted(rates, reverse=True)


def test_more_gpus_are_named_where_changes_do_not_suffice():
    plan = plan_of(seq_len=2**20, micro_batches=1, checkpointing="full")
    remedies = plan.remedies()
    assert not plan.fits and remedies
    assert all("GPUs" in remedy.changes[-1] and remedy.load.dims.world_size > 1 for remedy in remedies)
    assert all(Plan(remedy.load, plan.cluster).fits for remedy in remedies)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_of_cuda_graphs_is_told_what_it_can_take(graphs):
    changes = [found.changes for found in plan_of(dims=NO_ZERO, seq_len=32768, cuda_graphs=graphs).remedies()]
    assert ("run.activation_checkpoint=full",) in changes
    hosts = [found for found in changes if any(key in str(found) for key in ("offload", "zero", "pipeline"))]
    assert bool(hosts) != graphs
    already = plan_of(seq_len=32768, cuda_graphs=True).remedies()
    assert already and all("run.cuda_graphs=false" in found.changes for found in already), "ZeRO 1 is set"


def test_a_layout_that_fits_needs_no_remedy():
    assert plan_of(seq_len=2048).remedies() == []


def test_carries_do_not_grow_with_the_row():
    exchanged = [plan_of(dims=ParallelDims(context=4), seq_len=length).exchanged() for length in (8192, 131072)]
    assert exchanged[0] == exchanged[1]
    # State and transition of 2560 channels in fp32; three inputs of the convolution in bf16.
    assert exchanged[0]["rg_lru"] == {"carry": 2 * 2560 * 4, "halo": 3 * 2560 * 2}
    assert exchanged[0]["local_attention"] == {"carry": 0, "halo": 2 * 1023 * 128 * 2}
    assert plan_of().exchanged() == {}


def test_a_gpu_keeps_a_reserve():
    gpu = find_gpu("H100")
    assert gpu.usable == int((gpu.memory - 1.5 * GIB) * 0.94) < gpu.memory
    with pytest.raises(ConfigError, match="unknown GPU 'h1000'; known: .*h100"):
        find_gpu("h1000")
