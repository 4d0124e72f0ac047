import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.data import PACKINGS, PackingReport
from longscan.data.cache import SplitFiles
from longscan.data.packing import GROUP, BestFitRows, ConcatRows, best_fit, compare_packings
from longscan.data.streams import CorpusStream, Remaining


@st.composite
def pieces_for_bins(draw):
    bins, capacity = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    cuts = draw(st.lists(st.integers(1, bins * capacity), max_size=40, unique=True))
    bounds = np.array(sorted({0, bins * capacity, *cuts}))
    return np.diff(bounds), bins, capacity


@given(pieces_for_bins())
def test_best_fit_fills_every_bin_and_places_every_position_once(case):
    lengths, bins, capacity = case
    index, begin, length, number = best_fit(lengths, bins, capacity)
    assert (np.bincount(number, length, minlength=bins) == capacity).all()
    assert (length >= 1).all()
    seen = [np.zeros(n, int) for n in lengths]
    for i, b, n in zip(index, begin, length, strict=True):
        seen[i][b : b + n] += 1
    assert all((counts == 1).all() for counts in seen)


def test_best_fit_takes_the_fullest_bin_that_fits():
    index, begin, length, number = best_fit(np.array([3, 7, 6, 4]), 2, 10)
    assert sorted(zip(index.tolist(), number.tolist(), strict=True)) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert not begin.any()


def test_best_fit_cuts_long_pieces_at_multiples_and_splits_what_fits_nowhere():
    index, begin, length, _ = best_fit(np.array([25, 5]), 3, 10)
    assert sorted(zip(index.tolist(), begin.tolist(), length.tolist(), strict=True)) == [
        (0, 0, 10),
        (0, 10, 10),
        (0, 20, 5),
        (1, 0, 5),
    ]
    index, begin, length, _ = best_fit(np.array([6, 6, 6, 6, 6]), 3, 10)
    assert sorted(zip(index.tolist(), length.tolist(), strict=True)).count((0, 6)) == 1
    assert len(index) == 7, "three fit whole; two are split over gaps of 4, 4, 4"


def test_best_fit_of_many_small_documents_is_quick_and_cuts_few():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 160, 104_000)
    lengths = np.append(lengths[np.cumsum(lengths) < 256 * 32768], 0)
    lengths[-1] = 256 * 32768 - lengths.sum()
    index, *_ = best_fit(lengths, 256, 32768)
    assert len(index) - len(lengths) <= 256


def positions(pieces):
    return np.concatenate([np.arange(a, a + n) for a, n in zip(pieces.position, pieces.length, strict=True)])


@pytest.fixture(scope="module")
def stream(write_corpus):
    rng = np.random.default_rng(5)
    corpus = write_corpus([rng.integers(0, 60, 30) for _ in range(7)])
    return CorpusStream(SplitFiles(corpus, "train"), seed=2, shuffle_window=3)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("rows", [1, 77, GROUP, GROUP + 13, 2 * GROUP])
def test_rows_and_what_is_left_are_the_stream(stream, packing, rows):
    """Rows are full; they and the remainder hold each position once. The second stage begins inside a leftover."""
    first = packing(stream, Remaining.all(), 12, 0)
    second = BestFitRows(stream, first.after(rows), 17, 1)
    third = ConcatRows(stream, second.after(GROUP + 40), 9, 2)
    used = [first.row(k) for k in range(rows)]
    used += [second.row(k) for k in range(GROUP + 40)] + [third.row(k) for k in range(1000)]
    assert {int(row.length.sum()) for row in used[:rows]} == {12}
    for row in used:
        assert (np.diff(row.position) > 0).all(), "stream order in a row"
        assert (row.start + row.length <= row.total).all() and (row.start >= 0).all()
    everything = np.sort(np.concatenate([positions(row) for row in used]))
    left = third.after(1000)
    horizon = left.tail
    left_over = [np.arange(a, b) for a, b in zip(left.begins, left.ends, strict=True)]
    everything = np.sort(np.concatenate([everything, *left_over]))
    assert np.array_equal(everything, np.arange(horizon))


def test_concat_trains_the_rows_of_a_block_in_another_order(stream):
    rows = ConcatRows(stream, Remaining.all(), 12, 0)
    first = [rows.row(k).position[0] for k in range(rows.block)]
    assert sorted(first) == [12 * k for k in range(rows.block)] and first != sorted(first)
    epochs = np.array(first) // stream.total
    assert epochs[-1] >= 1 and (np.diff(epochs) >= 0).all(), "an epoch ends before the next begins"
    inside = np.array(first)[epochs == 0]
    assert (np.abs(np.diff(inside)) > 12).mean() > 0.8, "neighbours of the stream are torn apart"


@pytest.mark.parametrize("used", [1, 100, 255, 256, 300])
def test_concat_leaves_exactly_the_rows_it_did_not_use(stream, used):
    rows = ConcatRows(stream, Remaining.all(), 2**18, 0)
    assert rows.block == GROUP
    rows = ConcatRows(stream, Remaining.all(), 12, 0)
    rows.block = GROUP
    taken = np.concatenate([positions(rows.row(k)) for k in range(used)])
    left = ConcatRows(stream, rows.after(used), 12, 1)
    rest = np.concatenate([positions(left.in_order(k)) for k in range(2 * GROUP - used)])
    assert np.array_equal(np.sort(np.concatenate([taken, rest])), np.arange(2 * GROUP * 12))


def test_leftovers_come_first_and_in_stream_order(stream):
    first = BestFitRows(stream, Remaining.all(), 12, 0)
    left = first.after(100)
    unused = np.sort(np.concatenate([positions(first.row(k)) for k in range(100, GROUP)]))
    second = ConcatRows(stream, left, 12, 1)
    taken = np.concatenate([positions(second.in_order(k)) for k in range(GROUP - 100)])
    assert np.array_equal(taken, unused)
    assert positions(second.in_order(GROUP - 100))[0] == GROUP * 12


@settings(max_examples=100)
@given(st.sets(st.integers(0, 40), min_size=1), st.integers(0, 60), st.integers(1, 30))
def test_remaining(taken, begin, length):
    """Against the plain list of positions that are left."""
    begins = np.array(sorted(taken))
    left = Remaining.of(begins, begins + 1, 41)
    plain = [*sorted(taken), *range(41, 200)]
    starts, ends = left.intervals(begin, begin + length)
    got = [p for a, b in zip(starts, ends, strict=True) for p in range(a, b)]
    assert got == plain[begin : begin + length]
    rest = left.after(begin)
    got = [p for a, b in zip(*rest.intervals(0, 50), strict=True) for p in range(a, b)]
    assert got == plain[begin : begin + 50]
    assert (rest.ends < np.append(rest.begins[1:], rest.tail)).all() if len(rest.ends) else True


def test_report(stream):
    concat, fit = compare_packings(stream, Remaining.all(), 64)
    assert concat.efficiency == fit.efficiency == 1.0
    assert fit.cut < concat.cut and fit.headless < concat.headless
    assert "best_fit: 100.0% of positions are useful" in str(fit)
    assert (concat + concat).positions == 2 * concat.positions


def test_report_counts(write_corpus):
    corpus = write_corpus([[3, 3, 11]])
    stream = CorpusStream(SplitFiles(corpus, "train"))
    rows = ConcatRows(stream, Remaining.all(), 5, 0)
    report = PackingReport.of("concat", [rows.row(k) for k in range(4)], 5)
    assert (report.documents, report.longer, report.cut, report.headless) == (3, 1, 2, 3 + 10)
