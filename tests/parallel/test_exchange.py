"""One mixer over ranks: what it gives, and the bytes it exchanges, of which it hands on none that grow with T."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from matrix import config_of

from longscan.kernels import Segments
from longscan.models import LocalBackend
from longscan.models.mixers import MIXERS
from longscan.models.parameters import init_parameters
from longscan.models.sequence import LocalContext
from longscan.parallel import collectives
from longscan.parallel.context import ContextParallelContext

RANKS = 3
# The family whose tiny preset sizes the mixer, and how many all-gathers it takes each way.
MIXED = {
    "rg_lru": ("griffin", 1),
    "taylor_attention": ("based", 1),
    "linearized_attention": ("linearized", 1),
    "short_conv": ("based", 0),
    "local_attention": ("griffin", 0),
}
ATTENDING = ["local_attention", "linearized_attention"]
# Lengths of a row's documents, pieces of 7: spanning three ranks, beginning at an edge, and inside of a piece.
DOCUMENTS = [[21], [7, 14], [4, 15, 2]]


def mixer_of(name):
    mixer = MIXERS[name](config_of(MIXED[name][0]), LocalBackend())
    init_parameters(mixer, seed=3)
    return mixer.double()


def inputs(tokens, width):
    rng = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(len(DOCUMENTS), tokens, width, generator=rng, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), weight


def largest_error(name):
    """Of y and of every gradient, against the whole row in one process; relative to the largest number of each."""
    mixer, segments = mixer_of(name), Segments.from_lengths(DOCUMENTS)
    here = slice(dist.get_rank() * 7, dist.get_rank() * 7 + 7)
    x, weight = inputs(7 * RANKS, config_of(MIXED[name][0]).width)
    parameters = list(mixer.parameters())
    y = mixer(x, LocalContext(segments))
    expected = [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *parameters])]
    piece = x[:, here].detach().requires_grad_()
    y = mixer(piece, ContextParallelContext(segments.split(here.start, here.stop), dist.group.WORLD))
    found = [y.detach(), *torch.autograd.grad((y * weight[:, here]).sum(), [piece, *parameters])]
    for gradient in found[2:]:
        dist.all_reduce(gradient)
    expected[:2] = [t[:, here] for t in expected[:2]]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def exchanged(name, tokens):
    """[calls and bytes of all-gathers, messages and bytes of halos] of this rank, forward and backward."""
    counts = {"calls": 0, "gathered": 0, "messages": 0, "sent": 0}
    gather, message = dist.all_gather_into_tensor, dist.P2POp

    def counted_gather(into, flat, **options):
        counts["calls"] += 1
        counts["gathered"] += flat.nbytes
        return gather(into, flat, **options)

    def counted_message(op, tensor, **options):
        counts["messages"] += op is dist.isend
        counts["sent"] += tensor.nbytes * (op is dist.isend)
        return message(op, tensor, **options)

    mixer = mixer_of(name)
    x, weight = inputs(tokens, config_of(MIXED[name][0]).width)
    context = ContextParallelContext(Segments.whole(len(x), tokens), dist.group.WORLD)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.dist, "all_gather_into_tensor", counted_gather)
        patch.setattr(collectives.dist, "P2POp", counted_message)
        y = mixer(x, context)
        found.append(dict(counts))
        y.backward(weight)
        found.append({kind: count - found[0][kind] for kind, count in counts.items()})
    return found


def hidden_behind(name):
    """What happens to halos and queries, in order, forward and backward."""
    mixer, log = mixer_of(name), []
    begin, end = collectives._Way.begin, collectives._Way.end
    mixer.query.register_forward_hook(lambda *_: log.append("queries"))
    mixer.query.weight.register_hook(lambda _: log.append("queries"))
    x, weight = inputs(70, config_of(MIXED[name][0]).width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives._Way, "begin", lambda *way: log.append("begin") or begin(*way))
        patch.setattr(collectives._Way, "end", lambda way: log.append("end") or end(way))
        mixer(x, ContextParallelContext(Segments.whole(len(x), 70), dist.group.WORLD)).backward(weight)
    return log


def every_check():
    found = {
        name: {"error": largest_error(name), "bytes": [exchanged(name, tokens) for tokens in (70, 140)]}
        for name in MIXED
    }
    for name in ATTENDING:
        found[name]["order"] = hidden_behind(name)
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(every_check, RANKS, preload=["longscan.parallel.context", "longscan.models.mixers"])


@pytest.mark.parametrize("name", MIXED)
def test_a_mixer_over_odd_pieces_is_the_mixer(ranks, name):
    for found in ranks:
        assert found[name]["error"] < 1e-11


@pytest.mark.parametrize("name", MIXED)
def test_bytes_do_not_grow_with_the_tokens(ranks, name):
    for found in ranks:
        short, long = found[name]["bytes"]
        assert short == long
        forward, backward = short
        assert forward["calls"] == backward["calls"] == MIXED[name][1]
        # Of the transitions nothing goes back.
        assert backward["gathered"] < forward["gathered"] or not MIXED[name][1]
        assert forward["gathered"] <= 2 * backward["gathered"]
    # A halo goes right, its gradient left.
    sent = [[way["sent"] for way in found[name]["bytes"][0]] for found in ranks]
    assert sent[0][0] == sent[-1][1] and sent[0][1] == sent[-1][0] == 0
    assert (sent[0][0] > 0) == (name != "taylor_attention")
    # Keys and values travel together.
    assert all(way["messages"] <= 1 for found in ranks for way in found[name]["bytes"][0])


@pytest.mark.parametrize("name", ATTENDING)
def test_halos_travel_while_queries_are_computed(ranks, name):
    for found in ranks:
        assert found[name]["order"] == ["begin", "queries", "end"] * 2
