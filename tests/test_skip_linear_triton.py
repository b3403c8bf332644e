"""Runs interpreted_skip_linear.py, and holds the tables of tiles to what they promise."""

import pytest
from interpreting import run_interpreted

from scalelong.kernels.skip_linear_tilings import MAX_SPLITS, TABLES, choose_num_splits, choose_tile, num_tiles


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted("interpreted_skip_linear.py", "-m", "not exhaustive")


@pytest.mark.exhaustive
def test_every_shape_is_right_in_the_interpreter():
    run_interpreted("interpreted_skip_linear.py", "-m", "exhaustive")


@pytest.mark.parametrize(("product", "itemsizes"), [(product, itemsizes) for product, *itemsizes in TABLES])
def test_tables_run_from_the_largest_tile_down(product, itemsizes):
    areas = [tile.block_rows * tile.block_cols for tile in TABLES[product, *itemsizes].tiles]
    assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("width", [512, 768, 1024, 1152])
def test_the_shapes_of_public_networks_fill_a_large_gpu(width):
    tokens, multiprocessors = 64 * 257, 132
    for product, cols in (("forward", (width,)), ("inputs", (width, width))):
        tile = choose_tile(product, 2, 2, (tokens,), cols, multiprocessors)
        assert tile == TABLES[product, 2, 2].tiles[0]
        assert num_tiles(tile, (tokens,), cols) >= multiprocessors
    tile = choose_tile("weight", 2, 2, (width, width), (width,), multiprocessors // MAX_SPLITS)
    tiles = num_tiles(tile, (width, width), (width,))
    programs = tiles * choose_num_splits(tiles, tokens, multiprocessors)
    assert programs / (-(-programs // multiprocessors) * multiprocessors) > 0.8  # of the last wave, too


def test_few_tokens_are_summed_whole():
    assert choose_num_splits(32, 257, 132) == 1
