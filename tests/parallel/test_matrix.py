"""Every layout trains like plain torch in one process: loss, norm, each gradient on each rank, and weights, in fp64."""

import os
from dataclasses import asdict

import pytest
from distributed import run_distributed
from matrix import FAMILIES, LAYOUTS, TOLERANCES, fits, train, train_plainly, worst
from safetensors.torch import load_file, save_file

from longscan.parallel import ParallelDims, process_group

# A case is "layout family packed|whole". `make test` runs these few; each family, packing and feature is there.
FEW = [
    "cp3 griffin packed",
    "cp4 based packed",
    "cp2-recomputed linearized packed",
    "tp2 linearized whole",
    "tp4 sinusoidal packed",
    "tp2-cp2 hawk packed",
    "tp2-sp-cp2 griffin packed",
    "tp2-sp-recomputed based whole",
    "dp2-cp2 alibi packed",
    "dp2-tp2 griffin whole",
    "tp2-cp2-zero1 griffin packed",
    "tp2-sp-selective griffin whole",
    "pp4-uneven griffin packed",
    "pp2-interleaved-dp2 based packed",
    "pp2-dp2-zero1 griffin packed",
    "pp2-tp2-sp biased packed",
    "pp2-tp2-zero1 griffin packed",
    "pp2-cp2-selective hawk packed",
    "dp2-tp2-zero2 hawk packed",
    "cp2-zero3-offloaded griffin packed",
]


def compare(folder, cases):
    """This rank's worst error and its tensor in each case it takes part in."""
    rank, found = int(os.environ["RANK"]), {}
    for number, case in enumerate(cases):
        layout, family, packing = case.split()
        dims, options = LAYOUTS[layout]
        if rank < dims.world_size:
            place = {"rank": rank, "world_size": dims.world_size, "store": f"{folder}/store-{number}"}
            with process_group(**place, timeout_seconds=60):
                trained = train(family, packing == "packed", dims, **options)
            found[case] = worst(trained, load_file(f"{folder}/{family}-{packing}.safetensors"))
    return found


def run(folder, cases, timeout=110.0):
    """What each rank found in the cases, compared with one process."""
    for _, family, packing in map(str.split, cases):
        path = folder / f"{family}-{packing}.safetensors"
        if not path.exists():
            save_file(train_plainly(family, packing == "packed"), path)
    world_size = max(LAYOUTS[case.split()[0]][0].world_size for case in cases)
    preload, env = ["longscan.parallel.tensor", "deepspeed"], {"DS_ACCELERATOR": "cpu"}
    return run_distributed(compare, world_size, folder, cases, join=False, timeout=timeout, preload=preload, env=env)


def check(ranks, case):
    errors = [found[case] for found in ranks if case in found]
    dims, _ = LAYOUTS[case.split()[0]]
    assert len(errors) == dims.world_size
    assert max(errors)[0] <= TOLERANCES[dims.zero], errors


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run(tmp_path_factory.mktemp("matrix"), FEW)


@pytest.mark.parametrize("case", FEW)
def test_it_trains_like_one_process(few, case):
    check(few, case)


def test_the_few_cover_everything():
    layouts, families, packings = map(set, zip(*map(str.split, FEW), strict=True))
    assert families == FAMILIES.keys()
    assert packings == {"packed", "whole"}
    assert set.union(*map(features, layouts)) == set.union(*map(features, LAYOUTS))


def features(layout):
    """What a layout divides, however often, its ZeRO stage and its options."""
    dims, options = LAYOUTS[layout]
    divided = {name for name, size in asdict(dims).items() if size != asdict(ParallelDims())[name]}
    return divided | {f"zero {dims.zero}", *options.values()}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_of_it(tmp_path, layout):
    cases = [
        f"{layout} {family} {packing}" for family in FAMILIES if fits(family, layout) for packing in ("packed", "whole")
    ]
    ranks = run(tmp_path, cases, timeout=380.0)
    for case in cases:
        check(ranks, case)
