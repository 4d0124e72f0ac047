"""Pieces of rows know their documents, and nothing leaks from one document or from the future into another."""

import os
from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from matrix import FAMILIES, OPTIONS, PACKED, TOKENS, batch_of, model_of

from longscan.data.batch import IGNORED_LABEL
from longscan.kernels.segments import Segments
from longscan.parallel import Engine, ParallelDims, process_group
from longscan.parallel.context import piece_of

# Pieces of 6: document 2 (7 to 16) begins inside a piece, lies on three, and ends beside the edge at 18.
LENGTHS, SECOND, PROBED, LATE = [[7, 10, 7]], slice(7, 17), 3, 20
PROBES = {"cp4": {"context": 4}, "tp2-sp-cp2": {"tensor": 2, "context": 2, "sequence_parallel": True}}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("lengths", PACKED)
def test_pieces_see_the_rows_documents(lengths, size):
    batch = batch_of(lengths, 0)
    row = Segments(batch.cu_seqlens, batch.continues, batch.doc_start)
    tokens = TOKENS // size
    for rank in range(size):
        piece, here = piece_of(batch, rank, size), slice(rank * tokens, (rank + 1) * tokens)
        segments = Segments(piece.cu_seqlens, piece.continues, piece.doc_start)
        assert torch.equal(piece.inputs, batch.inputs[:, here])
        assert torch.equal(piece.labels, batch.labels[:, here])
        assert torch.equal(segments.positions, row.positions[:, here])
        assert torch.equal(segments.resets, row.resets[:, here])
        assert torch.equal(segments.continues, ~row.resets[:, here.start])
        assert segments.cu_seqlens.tolist() == bounds(row.resets[:, here])


def test_pieces_of_pinned_rows_are_pinned(monkeypatch):
    """Or their copies to a GPU would wait for it."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    piece = piece_of(batch_of([[TOKENS]], 0), 1, 2)
    held = [value for value in vars(piece).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 5 and all(any(tensor is other for other in pinned) for tensor in held)


def bounds(resets):
    """Where segments begin in rows laid end to end, each row beginning one, and their end."""
    resets = resets.clone()
    resets[:, 0] = True
    return [*resets.flatten().nonzero().flatten().tolist(), resets.numel()]


def test_a_row_that_cannot_be_cut_is_refused():
    with pytest.raises(AssertionError, match="24 tokens cannot be cut into 5"):
        piece_of(batch_of([[TOKENS]], 0), 0, 5)
    going_on = replace(batch_of([[TOKENS]], 0), continues=torch.tensor([True]))
    with pytest.raises(AssertionError, match="goes on with an earlier"):
        piece_of(going_on, 0, 2)


def probe(folder):
    """What changes, on this rank, when a token of document 1 or a late one does; in every layout and family."""
    rank, found = int(os.environ["RANK"]), {}
    for layout, sizes in PROBES.items():
        with process_group(rank=rank, world_size=4, store=f"{folder}/{layout}", timeout_seconds=60):
            for family in FAMILIES:
                found[f"{layout} {family}"] = probe_family(family, ParallelDims(zero=0, **sizes))
    return found


def probe_family(family, dims):
    engine = Engine(model_of(family, dims), dims, OPTIONS)
    batch = batch_of(LENGTHS, 5)
    labels = torch.full_like(batch.labels, IGNORED_LABEL)
    labels[:, SECOND] = batch.inputs.roll(-1, 1)[:, SECOND]
    batch = replace(batch, labels=labels)
    before, earlier, later = (observe(engine, with_token(batch, at)) for at in (None, PROBED, LATE))
    begin = dims.context and engine._loss.context.rank() * before["hidden"].shape[1]
    position = begin + torch.arange(before["hidden"].shape[1])
    moved = {name: (seen["hidden"] != before["hidden"]).any(-1)[0] for name, seen in (("1", earlier), ("late", later))}
    kept = {
        "gradients": all(torch.equal(a, b) for a, b in zip(earlier["gradients"], before["gradients"], strict=True)),
        "loss": earlier["loss"] == before["loss"] == later["loss"],
        "other documents": not bool(moved["1"][position >= SECOND.start].any()),
        "past": not bool(moved["late"][position < LATE].any()),
    }
    seen = {
        "1": bool(moved["1"][(position >= PROBED) & (position < SECOND.start)].any()),
        "late": bool(moved["late"][position >= LATE].any()),
    }
    engine.close()
    return {"kept": kept, "seen": seen}


def with_token(batch, position):
    """The batch with another token at `position`."""
    inputs = batch.inputs.clone()
    if position is not None:
        inputs[:, position] = (inputs[:, position] + 1) % 7
    return replace(batch, inputs=inputs)


def observe(engine, batch):
    """This rank's hidden states, loss and gradients before any sum over ranks."""
    kept = {}

    def keep(norm, inputs, output):
        kept["hidden"] = engine.model.backend.enter(output.detach()).clone()

    handle = engine.model.norm.register_forward_hook(keep)
    kept["loss"] = engine.forward_backward([batch], 10).item()
    handle.remove()
    kept["gradients"] = [p.grad.clone() for p in engine.model.parameters()]
    engine.discard()
    return kept


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return run_distributed(
        probe, 4, tmp_path_factory.mktemp("probes"), join=False, preload=["longscan.parallel.tensor"]
    )


@pytest.mark.parametrize("case", [f"{layout} {family}" for layout in PROBES for family in FAMILIES])
def test_no_bit_leaks_between_documents_or_from_the_future(probes, case):
    for found in probes:
        assert all(found[case]["kept"].values()), found[case]["kept"]
    for probed in ("1", "late"):
        assert any(found[case]["seen"][probed] for found in probes), "the probe must move its own document"
