import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.model.grid import Grid, Place

SIZE = st.sampled_from([1, 2, 3, 4])


def test_coordinates_count_from_tensor_parallel_outwards():
    """2 stages of 4 ranks: TP 2 x DP 2 for dense parameters, expert-TP 1 x EP 2 x 2 replicas for experts."""
    grid = Grid(tp=2, pp=2, dp=2, ep=2, etp=1)
    assert grid.world_size == 8
    assert grid.expert_dp == 2
    assert grid.place(5) == Place(tp=1, dp=0, pp=1, etp=0, ep=1, edp=0)
    assert grid.place(6) == Place(tp=0, dp=1, pp=1, etp=0, ep=0, edp=1)


@given(SIZE, SIZE, SIZE, SIZE, st.one_of(st.none(), SIZE))
def test_places_and_ranks_are_each_other_s_inverse(tp, pp, dp, ep, etp):
    assume(tp * dp % (ep * (etp or tp)) == 0)
    grid = Grid(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp)
    for rank in range(grid.world_size):
        place = grid.place(rank)
        assert grid.dense_rank(place.tp, place.dp, place.pp) == rank
        assert grid.expert_rank(place.etp, place.ep, place.edp, place.pp) == rank
        assert place.dp < dp
        assert place.edp < grid.expert_dp


@pytest.mark.parametrize(
    ("grid", "chunks"),
    [
        (Grid(pp=2), ((range(0, 4),), (range(4, 8),))),
        (Grid(pp=2, vpp=2), ((range(0, 2), range(4, 6)), (range(2, 4), range(6, 8)))),
        (Grid(pp=3, first_stage_layers=2, last_stage_layers=1), ((range(0, 2),), (range(2, 7),), (range(7, 8),))),
        (Grid(pp=2, vpp=2, last_stage_layers=2), ((range(0, 3), range(4, 7)), (range(3, 4), range(7, 8)))),
    ],
)
def test_eight_layers(grid, chunks):
    """Against megatron itself: tests/distributed/test_megatron_weights.py."""
    assert grid.chunks(8) == chunks
    stages = {layer: stage for stage, spans in enumerate(chunks) for span in spans for layer in span}
    assert grid.stages(8) == tuple(stages[layer] for layer in range(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp=0: must be at least 1"),
        ({"tp": 2, "ep": 4}, r"ep=4 x etp=2 does not divide the 2 ranks of a stage \(tp 2 x dp 1\)"),
        ({"tp": 2, "dp": 2, "ep": 2, "etp": 4}, "ep=2 x etp=4 does not divide the 4 ranks"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        Grid(**sizes)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(pp=3), "8 layers cannot be divided over 3 stages"),
        (Grid(pp=3, first_stage_layers=1), "8 layers cannot be divided over 3 stages, of which first 1 and last None"),
        (Grid(pp=2, first_stage_layers=4, last_stage_layers=5), "of which first 4 and last 5"),
        (Grid(pp=2, vpp=3), r"stages of \[4\] layers cannot be divided into vpp=3 chunks"),
    ],
)
def test_layers_that_do_not_fit(grid, message):
    with pytest.raises(ValueError, match=message):
        grid.chunks(8)
