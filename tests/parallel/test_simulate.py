"""The simulator on cases that a hand can compute, and the growth it must show."""

import json
import math
from dataclasses import replace

import pytest

from longscan.errors import ConfigError
from longscan.models.config import config_from_mapping, flops_per_token, load_preset
from longscan.parallel import ParallelDims
from longscan.parallel.plan import (
    RATIOS,
    Cluster,
    Gpu,
    Load,
    Ratio,
    errors,
    load_named,
    measured_ratios,
    simulate,
    study,
    work_name,
)
from longscan.parallel.plan.recorded import GRAPHED, RATE_METRIC
from longscan.parallel.plan.simulate import BUBBLE, CARRIES, GATHERED, GRADIENTS, HALOS, TENSOR, UPDATE, carry_seconds
from longscan.parallel.plan.study import layouts
from longscan.parallel.plan.work import PRODUCTS, Op, loss_ops, mixer_ops, mlp_ops

# Rates that are easy to divide by: 1 GB/s and 100 MB/s links, a message in 1 ms and 10 ms, no time to start.
ROUND = Cluster(
    Gpu("round", 2**36, 1e15, 1e12, 1e9), 4, 1e9, 1e8, intra_latency=1e-3, inter_latency=1e-2, start=0, launch=0
)
EXACT = {name: Ratio(1.0, 1.0) for name in RATIOS}


def load_of(preset="griffin-1.3b", dims=None, seq_len=8192, **fields):
    model = config_from_mapping({**load_preset(preset), "vocab_size": 32000})
    return Load(model, dims or ParallelDims(), seq_len, **fields)


def test_collectives_by_hand():
    # In a node: two messages of a tree, three quarters of the result over the link.
    assert ROUND.gather(4, 4, 1e6) == pytest.approx(2e-3 + 3e6 / 1e9)
    assert ROUND.reduce(4, 4, 4e6) == pytest.approx(2 * (2e-3 + 3e6 / 1e9))
    # Over two nodes the four adapters of a node carry the rings together, and messages take the network's time.
    assert ROUND.gather(8, 4, 1e6) == pytest.approx(3e-2 + 7e6 / 4e8)
    assert ROUND.send(4, 4, 1e6) == pytest.approx(1e-3 + 1e6 / 1e9)
    assert ROUND.send(8, 4, 1e6) == pytest.approx(1e-2 + 1e6 / 1e8)
    assert ROUND.gather(1, 1, 1e6) == ROUND.reduce(1, 1, 1e6) == ROUND.send(1, 1, 1e6) == 0


def test_groups_across_nodes():
    assert ROUND.local(8, 1) == 4
    assert ROUND.local(8, 2) == 2
    assert ROUND.local(2, 1) == 2
    assert ROUND.local(8, 16) == 1


def test_an_op_takes_the_larger_of_its_floors_and_its_launches():
    gpu = ROUND.gpu
    op = Op("x", "scan", (gpu.matmul, 2 * gpu.matmul), (3 * gpu.copy, gpu.copy), (1, 2))
    assert op.seconds(ROUND, EXACT) == pytest.approx((3.0, 2.0))
    assert op.seconds(ROUND, {"scan": Ratio(2.0, 4.0)}) == pytest.approx((6.0, 8.0))
    assert op.seconds(replace(ROUND, launch=5.0), EXACT) == pytest.approx((5.0, 10.0))


@pytest.mark.parametrize("preset", ["griffin-1.3b", "based-1.4b", "alibi-1.3b", "hawk-1.3b"])
def test_the_ops_do_the_models_flops(preset):
    load = load_of(preset)
    ops = [op for name in load.model.mixers for op in (*mixer_ops(load, name), *mlp_ops(load))]
    # Attention's backward pass forms the scores again: 3.5 forwards where the model's FLOPs count 3.
    again = sum(op.flops[0] / 2 for op in ops if op.ratio in ("window", "attention", "alibi"))
    done = (sum(op.flops[1] for op in (*ops, *loss_ops(load))) - again) / load.tokens
    # Norms, biases and convolutions have parameters that no product multiplies.
    assert done == pytest.approx(flops_per_token(load.model, load.seq_len), rel=0.002)


def test_ops_are_divided_over_tensor_and_context_ranks():
    whole, part = load_of(), load_of(dims=ParallelDims(context=2, tensor=4))
    for name in set(whole.model.mixers):
        flops = [
            sum(op.flops[1] for op in (*mixer_ops(load, name), *mlp_ops(load)) if op.term == PRODUCTS)
            for load in (whole, part)
        ]
        kv_whole = 0.02 * flops[0]
        assert flops[0] / 8 <= flops[1] <= (flops[0] + kv_whole) / 8 + kv_whole


def test_the_measured_scan_floor_is_the_benchmarks():
    load = load_of(seq_len=32768)
    (scan,) = (op for op in mixer_ops(load, "rg_lru") if op.ratio == "scan")
    assert scan.bytes == (4 * 32768 * 2560 * 2, 12 * 32768 * 2560 * 2)


def test_carries_grow_with_the_ranks_and_not_with_the_tokens():
    terms = [simulate(load_of(dims=ParallelDims(context=4), seq_len=n), ROUND).terms[CARRIES] for n in (8192, 131072)]
    assert terms[0] == terms[1] > 0
    quick = replace(ROUND, intra_latency=0.0, inter_latency=0.0)
    seconds = {ranks: carry_seconds(ParallelDims(context=ranks), quick, 1e6) for ranks in (32, 64)}
    assert seconds[64] / seconds[32] == pytest.approx(63 / 31, rel=0.01)
    # 4 ranks of a node, then 8 nodes: 3 MB inside and 7 MB between them, where flat 31 MB go over four adapters.
    fold = 2 * 1.5 * 1e6 / quick.gpu.copy
    by_node = carry_seconds(ParallelDims(context=32), quick, 1e6, by_node=True)
    assert by_node == pytest.approx(3e6 / 1e9 + 7e6 / 1e8 + 12 * fold)
    flat = carry_seconds(ParallelDims(context=32), quick, 1e6)
    assert flat == pytest.approx(31e6 / 4e8 + 32 * fold)


def test_halos_of_windows_and_of_whole_rows():
    dims = ParallelDims(context=2)
    window = simulate(load_of(dims=dims), ROUND).terms[HALOS]
    entries = 16 * (3 * 2560 * 2) + 8 * 2 * (1023 * 128 * 2)
    messages = 16 + 8
    assert window == pytest.approx(2 * (messages * 1e-3 + entries / 1e9))
    whole = simulate(load_of("alibi-1.3b", dims=dims), ROUND).terms[HALOS]
    assert whole == pytest.approx(2 * 25 * (1e-3 + 2 * 4096 * 2048 * 2 / 1e9))


def test_one_gpu_exchanges_nothing():
    step = simulate(load_of(), ROUND)
    assert step.overhead == "none"
    assert all(step.terms[name] == 0 for name in (TENSOR, CARRIES, HALOS, BUBBLE, GRADIENTS, GATHERED))
    assert step.seconds == pytest.approx(sum(step.terms.values()))
    assert step.rate == pytest.approx(8192 / step.seconds)


def test_a_tensor_rank_sums_four_times_a_block():
    load = load_of(dims=ParallelDims(tensor=4))
    one = ROUND.reduce(4, 4, 8192 * 2048 * 2)
    assert simulate(load, ROUND).terms[TENSOR] == pytest.approx((4 * 24 + 2) * one)
    assert simulate(replace(load, checkpointing="full"), ROUND).terms[TENSOR] == pytest.approx((6 * 24 + 2) * one)


def test_the_bubble_is_what_the_other_stages_wait():
    dims = ParallelDims(pipeline=4)
    step = simulate(load_of(dims=dims, micro_batches=8), ROUND)
    each = (step.seconds - step.terms[BUBBLE] - step.terms["pipeline transfers"] - step.terms[UPDATE]) / 8
    assert step.terms[BUBBLE] == pytest.approx(3 * each)
    halved = simulate(load_of(dims=replace(dims, interleave=2), micro_batches=8), ROUND)
    assert halved.terms[BUBBLE] == pytest.approx(step.terms[BUBBLE] / 2)


def test_gradients_are_summed_once_a_step_and_hidden_as_far_as_they_overlap():
    dims = ParallelDims(data=4)
    load = load_of(dims=dims, micro_batches=4)
    params = 1_308_477_440
    step = simulate(load, ROUND)
    assert step.terms[GRADIENTS] == pytest.approx(4e-3 + 2 * 3 * params / 1e9)
    assert step.terms[GATHERED] == pytest.approx(2e-3 + 2 * 3 * params / 4 / 1e9)
    sharded = simulate(replace(load, dims=replace(dims, zero=2)), ROUND)
    assert sharded.terms[GRADIENTS] == pytest.approx(4 * (2e-3 + 3 * params / 1e9))
    assert simulate(load, ROUND, overlap=1e9).terms[GRADIENTS] == 0


def test_recomputation_costs_the_forward_pass_again():
    load = load_of(micro_batches=2)
    mixers = sum(op.seconds(ROUND, EXACT)[0] for name in load.model.mixers for op in mixer_ops(load, name))
    mlps = load.model.layers * sum(op.seconds(ROUND, EXACT)[0] for op in mlp_ops(load))
    steps = [simulate(replace(load, checkpointing=mode), ROUND, EXACT) for mode in ("none", "selective", "full")]
    again = [step.terms["recomputation"] for step in steps]
    assert again == pytest.approx([0, 2 * mlps, 2 * (mlps + mixers)])
    assert steps[2].seconds - steps[0].seconds == pytest.approx(again[2])


def test_only_bf16_has_rates():
    with pytest.raises(ConfigError, match="precision is fp32"):
        simulate(load_of(precision="fp32"), ROUND)


def test_layouts_use_every_gpu_and_fit():
    cluster = Cluster(Gpu("h", 80 * 2**30, 1e15, 3e12, 4e11))
    found = list(layouts(load_of(), cluster, 16, 32768, rows=8))
    assert found
    for load in found:
        assert load.dims.world_size == 16 and load.dims.data <= 8
        assert load.dims.tensor <= 8
        load.dims.validate(16, load.model, [32768])
        assert load.micro_batches == math.ceil(8 / load.dims.data)


def test_a_study_says_where_scaling_ends():
    cluster = Cluster(Gpu("h", 80 * 2**30, 1e15, 3e12, 4e11))
    found = study(load_of(), cluster, 2**18, [8, 16, 1024], [32768])
    steps = found.steps[32768]
    assert [step.load.dims.world_size for step in steps] == [8, 16, 1024]
    assert found.scaling(32768)[0] == 1 > found.scaling(32768)[-1]
    limit = found.limit(32768)
    assert limit is None or limit[1] in steps[-1].terms | steps[-2].terms
    carries = found.carries()
    assert [carry.ranks for carry in carries] == [2**power for power in range(1, 11)]
    assert carries[-1].by_node < carries[-1].flat
    assert carries[1].bytes == 3 * carries[0].bytes


def test_a_recorded_step_is_found_by_its_name():
    load = load_of(dims=ParallelDims(data=2, context=2, zero=0), micro_batches=3, checkpointing="selective")
    name = work_name("griffin-1.3b", load)
    assert load_named(name) == load
    assert load_named("rg_lru (1, 32768, 2560) bf16") is None
    row = {"work": name, "impl": "longscan", "metric": RATE_METRIC, "value": 1000.0}
    others = [{**row, "metric": "peak"}, {**row, "impl": "peer"}, {**row, "value": 900.0}]
    assert errors([*others, row], ROUND) == {name: (1000.0, simulate(load, ROUND).rate)}
    # The host is no part of the simulation: with CUDA graphs it counts for less, whenever that was recorded.
    graphed = {**row, "impl": GRAPHED, "value": 1200.0}
    assert errors(iter([graphed, *others, row]), ROUND) == {name: (1200.0, simulate(load, ROUND).rate)}


def test_ratios_come_from_the_newest_rows(tmp_path):
    work = "rg_lru (1, 32768, 2560) bf16"
    rows = [
        {"work": work, "impl": "longscan", "metric": "fwd", "value": 9.0, "floor": 1.0},
        {"work": work, "impl": "longscan", "metric": "fwd", "value": 2.5, "floor": 2.0},
        {"work": work, "impl": "longscan", "metric": "fwd x floor", "value": 7.0, "floor": None},
        {"work": work, "impl": "peer", "metric": "fwd+bwd", "value": 7.0, "floor": 1.0},
    ]
    file = tmp_path / "kernels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratios = measured_ratios(file)
    assert (ratios["scan"].forward, ratios["scan"].both) == (1.25, RATIOS["scan"].both)
    assert ratios["window"] == RATIOS["window"]
    with pytest.raises(ConfigError, match="holds no results"):
        measured_ratios(tmp_path / "none.jsonl")
