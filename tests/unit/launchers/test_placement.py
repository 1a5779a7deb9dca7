"""Which node each process goes to: hand-made cases, and what must hold for every layout."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.placement import PlacementError, least_nodes, place


@pytest.mark.parametrize(
    ("world", "tp", "engines", "engine_gpus", "gpus", "ranks", "homes"),
    [
        (4, 2, 2, 2, [4, 4], (0, 0, 0, 0), (1, 1)),  # learner on the first node, engines apart
        (2, 2, 1, 2, [4], (0, 0), (0,)),  # beside each other
        (4, 4, 2, 2, [2, 2, 2, 2], (0, 0, 1, 1), (2, 3)),  # a TP group larger than a node takes whole nodes
        (3, 3, 1, 1, [4, 4], (0, 0, 0), (0,)),
        (6, 3, 0, 0, [4, 4], (0, 0, 0, 1, 1, 1), ()),  # no group is split, though a GPU stays idle
        (2, 1, 2, 0, [0, 0], (0, 1), (1, 0)),  # CPUs: both dealt out
        (4, 2, 1, 0, [0, 0], (0, 0, 1, 1), (1,)),
        (2, 2, 1, 0, [0, 0], (0, 0), (1,)),
        (2, 1, 1, 0, [2, 2], (0, 0), (0,)),  # native engines beside the first rank
    ],
)
def test_by_hand(world, tp, engines, engine_gpus, gpus, ranks, homes):
    placed = place(world, tp, engines, engine_gpus, gpus)
    assert (placed.learner_nodes, placed.engine_nodes(max(1, engine_gpus))) == (ranks, homes)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ((8, 4, 1, 4, [4, 4]), "engine 0 needs 4 GPUs of one node; free are 0, 0"),
        ((4, 4, 1, 1, [3, 3]), "needs 4 GPUs, which nodes of 3 cannot divide evenly"),
        ((2, 2, 1, 8, [4, 4]), "an engine needs 8 GPUs, a node has 4: engines of several nodes are not supported"),
        ((8, 8, 0, 0, [4]), "needs 2 whole nodes of 4 GPUs, 1 are free"),
    ],
)
def test_what_does_not_fit_is_said(layout, said):
    with pytest.raises(PlacementError, match=said):
        place(*layout)


@given(
    groups=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 4]),
    engines=st.integers(0, 5),
    engine_gpus=st.sampled_from([1, 2, 4]),
    nodes=st.integers(1, 6),
)
def test_no_gpu_is_taken_twice_and_no_group_is_split(groups, tp, engines, engine_gpus, nodes):
    try:
        placed = place(groups * tp, tp, engines, engine_gpus, [4] * nodes)
    except PlacementError:
        # Groups whose sizes are powers of two pack without waste: a refusal means that GPUs are short.
        assert groups * tp + engines * engine_gpus > 4 * nodes or engine_gpus > tp
        return
    taken = Counter(placed.learner_nodes) + Counter({node: 0 for node in range(nodes)})
    for node in placed.engine_nodes(engine_gpus):
        taken[node] += engine_gpus
    assert max(taken.values()) <= 4
    assert all(len(set(placed.learner_nodes[i : i + tp])) == 1 for i in range(0, groups * tp, tp))


@given(
    groups=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    engines=st.integers(0, 5),
    engine_gpus=st.sampled_from([0, 1, 2, 3, 4]),
    colocated=st.booleans(),
)
def test_the_least_number_of_nodes_is_enough_and_one_less_is_not(groups, tp, engines, engine_gpus, colocated):
    layout = (groups * tp, tp, engines, engine_gpus)
    try:
        nodes = least_nodes(*layout, 4, colocated=colocated)
    except PlacementError:
        with pytest.raises(PlacementError):
            place(*layout, [4] * 100, colocated=colocated)
        return
    assert max(place(*layout, [4] * nodes, colocated=colocated).nodes) == nodes - 1
    if nodes > 1:
        with pytest.raises(PlacementError):
            place(*layout, [4] * (nodes - 1), colocated=colocated)


def test_without_gpus_one_node_is_enough():
    assert least_nodes(4, 2, 3, 0, 0) == 1


def test_colocated_engines_share_the_gpus_of_ranks_in_order():
    placed = place(8, 2, 4, 2, [4, 4], colocated=True)
    assert (placed.learner_nodes, placed.engine_nodes(2)) == ((0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1))
    assert place(4, 2, 1, 4, [4], colocated=True).engine_nodes(4) == (0,)  # an engine over two tensor-parallel groups


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ((4, 2, 3, 2, [4]), "engine 2 needs the GPUs of 2 learner ranks, of 4 are left 0"),
        ((6, 3, 1, 4, [4, 4]), "engine 0 would share GPUs of the nodes \\[0, 1\\]"),
    ],
)
def test_colocated_engines_that_do_not_fit(layout, said):
    with pytest.raises(PlacementError, match=said):
        place(*layout, colocated=True)
