"""How the tuner of the GroupNorm kernels chooses from times; the times are made up."""

from scalelong.bench.tune_group_norm import (
    FLAT,
    SPLIT,
    Candidate,
    Timed,
    Times,
    candidates_for,
    cases,
    fastest_of_each_form,
    is_ruled_out,
    num_tiles,
    tables,
)
from scalelong.kernels.group_norm_tilings import TABLES, VECTOR_BYTES, FlatTiling, choose_tiling


def made_up(key: tuple[str, bool]) -> Times:
    """Small groups are fastest with few warps and large ones with many, until splitting is faster."""
    times: Times = {}
    for case in (case for case in cases() if case.key == key):
        times[case] = {}
        rows = case.rows_of_group
        for tiling, candidate in ((tiling, x) for tiling, same in candidates_for(case, 132).items() for x in same):
            entry = candidate.entry
            if candidate.form == "flat":
                pieces = rows / (32 * entry.num_warps)
                ms = 1.0 + 0.1 * abs(entry.num_warps - min(16, max(1, rows / 128))) + (10 if pieces > 8 else 0)
            elif candidate.form == "whole":
                ms = 1.0 + 0.01 * entry.num_warps + (1.0 if num_tiles(tiling) > 3 else 0)
            else:
                ms = 1.5 + 0.01 * abs(entry.num_warps - 4) + 0.01 * abs(entry.max_tiles - 16)  # type: ignore[union-attr]
            ms += 0.001 if entry.max_registers else 0
            times[case][candidate] = Timed(ms, num_tiles(tiling), spill_bytes=8)
    return times


def test_flat_entries_cover_groups_up_to_where_splitting_is_faster():
    times = made_up(("forward", False))
    flat = tables(times, "made up")["forward", False].flat
    warps = [entry.num_warps for entry in flat]
    assert warps == sorted(set(warps))
    assert len(warps) > 1
    assert all(entry.max_pieces <= 8 and entry.max_registers is None for entry in flat)
    rows = [entry.num_warps * entry.max_pieces for entry in flat]
    assert rows == sorted(set(rows))
    assert all(entry.spill_bytes == 8 for entry in flat)


def test_tiles_are_those_that_are_least_slow():
    table = tables(made_up(("forward", True)), "made up")["forward", True]
    assert table.whole is not None
    assert table.whole.max_tiles <= 3  # more are slower than splitting
    assert table.whole.max_registers is None
    assert (table.split.num_warps, table.split.max_tiles) == (4, 16)
    assert (table.source, table.flat) == ("made up", ())


def test_what_was_not_timed_stays_as_it_is():
    assert tables({}, "made up") == {}
    case = next(case for case in cases() if case.key == ("forward", False))
    only_split = {case: {Candidate("split", SPLIT[0]): Timed(1.0, 0, 0)}}
    table = tables(only_split, "made up")["forward", False]
    assert table.flat == TABLES["forward", False].flat
    assert table.split == SPLIT[0]


def test_candidates_are_forced_and_afterwards_the_tables_are_as_before():
    case = min((case for case in cases() if case.key == ("forward", False)), key=lambda case: case.rows_of_group)
    c = case.concat
    sizes = (c.gpu_batch, c.num_hidden, c.num_skip, 32, c.size**2, 132)
    arguments = ("forward", False, case.itemsize, VECTOR_BYTES // case.itemsize, *sizes)
    before = choose_tiling(*arguments)
    found = [candidate for same in candidates_for(case, 132).values() for candidate in same]
    assert {candidate.form for candidate in found} == {"flat", "split"}
    assert Candidate("flat", FLAT[0]) in found
    assert choose_tiling(*arguments) == before
    assert isinstance(before, FlatTiling)


def test_a_run_cut_short_has_seen_all_sizes_and_keeps_the_entries_of_smaller_groups():
    order = cases()
    assert [case.itemsize for case in order] == sorted(case.itemsize for case in order)
    sizes = [case.concat.num_elements(case.concat.gpu_batch) for case in order if case.key == ("forward", False)]
    quarter = sizes[: len(sizes) // 8]  # of both dtypes an eighth each
    assert quarter == sorted(quarter, reverse=True)
    assert quarter[0] == max(sizes)
    assert quarter[-1] < max(sizes) / 8
    key = ("forward", False)
    large = {case: found for case, found in made_up(key).items() if case.rows_of_group > 2000}
    assert large
    kept = tables(large, "made up")[key].flat
    assert kept[:4] == TABLES[key].flat[:4]
    assert all(entry.num_warps * entry.max_pieces * 32 > 2000 for entry in kept[4:])


def test_a_report_names_the_fastest_of_each_form():
    timed = {
        Candidate("flat", FLAT[0]): Timed(0.002, 1, 0),
        Candidate("flat", FLAT[2]): Timed(0.001, 1, 0),
        Candidate("split", SPLIT[0]): Timed(0.003, 0, 0),
    }
    split = "split 2 warps, 1 rows, 8 tiles, 7 warps on an SM 3.0 us"
    assert fastest_of_each_form(timed) == f"flat 2 warps 1.0 us; {split}"


def test_large_spills_and_few_warps_rule_a_candidate_out():
    assert not is_ruled_out(spill_bytes=64, num_warps=16)
    assert is_ruled_out(spill_bytes=1000, num_warps=64)
    assert is_ruled_out(spill_bytes=0, num_warps=12)
