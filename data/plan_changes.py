"""How two data plans, in the form that `DataPlan.to_dict` writes, differ, and up to where their rows are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .mixing import Mixture

Saved = dict[str, Any]
SAME_EVERYWHERE = ("version", "seed", "shuffle_window", "split")


def skip_past(ranges: Sequence[Sequence[int]], row: int) -> int:
    """The plan row of the `row`-th row that is not in one of the ascending (first, end) ranges."""
    for first, end in ranges:
        if row < first:
            break
        row += end - first
    return row


def differences(saved: Saved, now: Saved) -> list[str]:
    """What changed from the saved plan to the present one, a sentence each; nothing where they are equal."""
    found = [_changed(key, saved, now) for key in (*SAME_EVERYWHERE, "weights") if saved.get(key) != now.get(key)]
    found += _list_changes("corpus", saved["corpora"], now["corpora"])
    for number, (before, after) in enumerate(zip(saved["stages"], now["stages"], strict=False)):
        found += [f"stage {number}: {_changed(key, before, after)}" for key in after if before.get(key) != after[key]]
    for number in range(len(now["stages"]), len(saved["stages"])):
        found.append(f"stage {number} ({_in_words(saved['stages'][number])}) is gone")
    for number in range(len(saved["stages"]), len(now["stages"])):
        found.append(f"stage {number} ({_in_words(now['stages'][number])}) is new")
    for number in range(max(len(saved["skipped_rows"]), len(now["skipped_rows"]))):
        before, after = (dict(enumerate(plan["skipped_rows"])).get(number, []) for plan in (saved, now))
        if before != after:
            found.append(f"stage {number}: skipped rows were {before or 'none'}, are {after or 'none'}")
    return found


def agree(saved: Saved, now: Saved, stage: int, row: int) -> bool:
    """Whether both plans give the same rows before `row` of `stage`, and mean the same place by it."""
    if (stage, row) == (0, 0):
        return True
    if any(saved.get(key) != now.get(key) for key in SAME_EVERYWHERE):
        return False
    if any(len(plan["stages"]) <= stage for plan in (saved, now)):
        return False
    return all(
        _used(saved, number, None if number < stage else row) == _used(now, number, None if number < stage else row)
        for number in range(stage + 1)
    )


def _used(plan: Saved, number: int, row: int | None) -> Any:
    """All that decides the first `row` rows (None: every row) of a stage; None where it has fewer."""
    stage = plan["stages"][number]
    rows = stage["rows"] if row is None else row
    if row == 0:
        return "no row"
    if rows is None or (stage["rows"] is not None and rows > stage["rows"]):
        return plan
    ranges = plan["skipped_rows"][number]
    end = skip_past(ranges, rows - 1)
    counts = Mixture.of(tuple(stage["weights"] or plan["weights"]), f"weights of stage {number}").counts
    return {
        "rows": rows,
        "seq_len": stage["seq_len"],
        "packing": stage["packing"],
        "skipped": [list(bounds) for bounds in ranges if bounds[0] < end],
        "corpora": [(corpus, plan["corpora"][corpus], count) for corpus, count in enumerate(counts) if count],
    }


def _changed(key: str, before: Saved, after: Saved) -> str:
    return f"{key} was {before.get(key)!r}, is {after.get(key)!r}"


def _list_changes(what: str, before: list[str], after: list[str]) -> list[str]:
    found = [f"{what} {i} was {a}, is {b}" for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    found += [f"{what} {i} ({before[i]}) is gone" for i in range(len(after), len(before))]
    return found + [f"{what} {i} ({after[i]}) is new" for i in range(len(before), len(after))]


def _in_words(stage: Saved) -> str:
    rows = "endless" if stage["rows"] is None else f"{stage['rows']}"
    return f"{rows} rows of {stage['seq_len']}, {stage['packing']}"
