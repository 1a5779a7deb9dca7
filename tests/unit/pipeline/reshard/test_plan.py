"""Every promise of the plan, checked entry by entry against masks of who holds and who needs what."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import architecture
from pipeline.model.architecture import FAMILIES, Architecture, Moe
from pipeline.model.grid import Grid
from pipeline.model.layout import rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.pieces import FANOUT, INTER, LOCAL, NEAR
from pipeline.reshard.plan import make_plan

GIB = 2**30
MODELS = Path(__file__).resolve().parents[4] / "configs/model"


def tiny(family="Qwen3ForCausalLM", kv_heads=2, ffn=8, vocab=9, layers=2, tied=False, moe=None, head_dim=4):
    own = FAMILIES[family]
    has = {"qkv_bias": own.qkv_bias is True, "qk_norm": own.qk_norm is True}
    return Architecture(own, layers, 6, ffn, 8, kv_heads, head_dim, vocab, 16, 1e-6, 1e4, None, tied, moe, **has)


def big(name):
    return architecture.parse(json.loads((MODELS / name / "config.json").read_text()))


@st.composite
def cases(draw):
    """A model, both layouts and a placement that fit each other."""
    tp, etp, ep = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    ep_engine = draw(st.sampled_from([1, 2, 4]))
    moe = draw(st.booleans())
    dp = draw(st.integers(1, 3))
    if not moe:
        ep = ep_engine = etp = 1
    while (tp * dp) % (ep * etp):
        dp += 1
    pp, vpp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    layers = pp * vpp * draw(st.integers(1, 2))
    learner = Grid(tp=tp, pp=pp, dp=dp, vpp=vpp, ep=ep, etp=etp)
    engines = EngineGrid(ep_engine * draw(st.sampled_from([1, 2])), ep_engine, draw(st.integers(1, 3)))
    model = tiny(
        "Qwen3MoeForCausalLM" if moe else draw(st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM"])),
        draw(st.sampled_from([1, 2, 4, 8])),
        8 * draw(st.integers(1, 2)),
        draw(st.integers(4, 200)),
        layers,
        draw(st.booleans()),
        Moe(tuple(layer % 2 == 0 for layer in range(layers)), 4, 8, 2) if moe else None,
    )
    colocated = draw(st.booleans()) and engines.world_size <= learner.world_size
    world = learner.world_size + (0 if colocated else engines.world_size)
    nodes = tuple(draw(st.integers(0, 3)) for _ in range(world))
    placement = Placement(learner.world_size, engines.world_size, colocated, nodes)
    if draw(st.booleans()):
        placement = Placement.consecutive(
            learner.world_size, engines.world_size, colocated, draw(st.sampled_from([2, 4, 8]))
        )
    return model, learner, engines, placement


def masks(plan):
    """Entries held and needed, as booleans ``[process, entry]`` by tensor name."""
    model, world = plan.model, plan.placement.world_size
    held = {tensor.name: np.zeros((world, tensor.length), bool) for tensor in plan.tensors}
    needed = {name: np.zeros_like(mask) for name, mask in held.items()}
    experts = model.moe.experts if model.moe else 0
    for row in rows(model, plan.learner):
        for rank in range(plan.learner.world_size):
            part = row.part(plan.learner, rank)
            for cut in row.slices(*part) if part else ():
                held[row.sources[cut.source].name][rank, cut.source_start : cut.source_start + cut.length] = True
        for index, source in enumerate(row.sources):
            for rank in range(plan.engines.world_size):
                span = plan.engines.interval(row, index, experts, rank % plan.engines.tp)
                needed[source.name][plan.placement.engine_process(rank), span.start : span.stop] = True
    return held, needed


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([3000, 20000, 1 << 30]), st.sampled_from([1, 200, 1 << 16]))
def test_plan_keeps_its_promises(case, bucket_bytes, smallest_share):
    plan = make_plan(*case, bucket_bytes=bucket_bytes, smallest_share=smallest_share)
    held, needed = masks(plan)
    nodes = np.array(plan.placement.nodes)
    tasks = plan.tasks()
    written = {name: np.zeros(mask.shape, int) for name, mask in held.items()}
    entered = np.zeros(nodes.max() + 1, int)
    ingress = np.zeros(len(nodes), int)
    buffers = np.zeros((plan.buckets, 2, len(nodes)), int)
    arrived = {}
    for i in range(len(tasks)):  # in the order of execution
        tensor = plan.tensors[tasks.tensor[i]]
        span = slice(tasks.start[i], tasks.start[i] + tasks.length[i])
        source, destination, kind, bucket = (
            column[i] for column in (tasks.source, tasks.destination, tasks.kind, tasks.bucket)
        )
        assert tasks.bytes[i] == tasks.length[i] * tensor.entry_bytes > 0
        written[tensor.name][destination, span] += 1
        if kind == FANOUT:
            assert (arrived[tensor.name, source][span] == bucket).all()
        else:
            assert held[tensor.name][source, span].all()
        if kind == INTER:
            arrived.setdefault((tensor.name, destination), np.full(tensor.length, -1))[span] = bucket
            entered[nodes[destination]] += tasks.bytes[i]
        assert (kind == INTER) == (nodes[source] != nodes[destination])
        assert (kind == LOCAL) == (source == destination)
        if kind != LOCAL:
            ingress[destination] += tasks.bytes[i]
            buffers[bucket, int(kind == FANOUT), [source, destination]] += tasks.bytes[i]
    assert buffers.max(initial=0) <= bucket_bytes
    minimum = np.zeros(len(nodes), int)
    bound = np.zeros(nodes.max() + 1, int)
    for tensor in plan.tensors:
        assert (written[tensor.name] == needed[tensor.name]).all()  # every destination entry exactly once
        lacking = needed[tensor.name] & ~held[tensor.name]
        minimum += lacking.sum(1) * tensor.entry_bytes
        for node in range(len(bound)):
            on = nodes == node
            bound[node] += (needed[tensor.name][on].any(0) & ~held[tensor.name][on].any(0)).sum() * tensor.entry_bytes
    assert (ingress == minimum).all()
    assert (entered == bound).all()
    assert (plan.bounds.ingress == minimum).all()
    assert (plan.bounds.node_ingress == bound).all()


@settings(deadline=None, max_examples=40)
@given(cases())
def test_replicas_share_the_sending(case):
    """All replicas of a segment send, and all needers on a node take in, equally: one entry per segment off at most."""
    plan = make_plan(*case, smallest_share=1)
    held, needed = masks(plan)
    nodes = np.array(plan.placement.nodes)
    tasks = plan.tasks()
    shares, lines = {}, {}
    for i in np.flatnonzero((tasks.kind == INTER) | (tasks.kind == NEAR)):
        tensor, entry = plan.tensors[tasks.tensor[i]], tasks.start[i]
        source, destination, kind = tasks.source[i], tasks.destination[i], tasks.kind[i]
        holders = held[tensor.name][:, entry]
        there = nodes == nodes[destination]
        takers = needed[tensor.name][:, entry] & there
        senders = holders if kind == INTER else holders & there
        groups = [("send", source, senders), ("receive", destination, takers)]
        for side, process, group in groups if kind == INTER else groups[:1]:
            key = (
                side,
                kind,
                tuple(np.flatnonzero(group)),
                None if side == "send" and kind == INTER else nodes[destination],
            )
            shares.setdefault(key, dict.fromkeys(np.flatnonzero(group), 0))[process] += tasks.bytes[i]
            # Shares of one line (the segment, for INTER over all nodes) differ by an entry; NEAR has a line per needer.
            line = tensor.name, segment(held, needed, tensor.name, entry), destination if kind == NEAR else None
            lines.setdefault(key, {})[line] = tensor.entry_bytes
    for key, by_process in shares.items():
        slack = sum(lines[key].values())
        assert max(by_process.values()) - min(by_process.values()) <= slack, key


def segment(held, needed, name, entry):
    """Identifies entries that the same processes hold and need."""
    return held[name][:, entry].tobytes() + needed[name][:, entry].tobytes()


@pytest.mark.parametrize(
    ("model", "learner", "engines", "colocated"),
    [
        ("qwen3-32b", Grid(tp=2, pp=4, dp=4), EngineGrid(2, count=16), True),
        ("qwen3-32b", Grid(tp=4, pp=2, dp=4), EngineGrid(4, count=8), False),
        ("qwen2.5-32b", Grid(tp=8, dp=3), EngineGrid(4, count=5), False),
    ],
)
def test_real_models_use_replicas_evenly(model, learner, engines, colocated):
    """max / mean <= 1.1 among data-parallel replicas (bytes into nodes), and among equal ranks of a node (bytes taken
    in).
    """
    plan = make_plan(
        big(model), learner, engines, Placement.consecutive(learner.world_size, engines.world_size, colocated)
    )
    sent, received = plan.traffic()[INTER].sum(1)
    for stage in range(learner.pp):
        for tp in range(learner.tp):
            replicas = sent[[learner.dense_rank(tp, dp, stage) for dp in range(learner.dp)]]
            assert replicas.max() <= 1.1 * replicas.mean()
    peers = {}
    for rank in range(engines.world_size):
        process = plan.placement.engine_process(rank)
        peers.setdefault((plan.placement.nodes[process], rank % engines.tp), []).append(received[process])
    for node_peers in peers.values():
        assert max(node_peers) <= 1.1 * np.mean(node_peers)


@pytest.mark.parametrize(
    ("learner", "engines", "colocated", "minimum", "full", "node"),
    [  # GiB: per rank and whole tensors (resharding study, Qwen3-32B bf16), into each node of 8 GPUs
        (Grid(tp=8, pp=4), EngineGrid(8, count=4), True, 5.8, 59.2, 46.5),
        (Grid(tp=4, pp=4, dp=2), EngineGrid(8, count=4), True, 7.6, 57.4, 46.5),
        (Grid(tp=8, pp=4), EngineGrid(4, count=8), True, 15.3, 59.2, 46.5),
        (Grid(tp=8, pp=2), EngineGrid(8, count=2), False, 7.6, 61.0, 61.0),
    ],
)
def test_known_numbers_of_qwen3_32b(learner, engines, colocated, minimum, full, node):
    placement = Placement.consecutive(learner.world_size, engines.world_size, colocated)
    plan = make_plan(big("qwen3-32b"), learner, engines, placement)
    assert plan.bounds.ingress.max() / GIB == pytest.approx(minimum, abs=0.05)
    assert plan.bounds.full_ingress.max() / GIB == pytest.approx(full, abs=0.05)
    assert plan.bounds.node_ingress.max() / GIB == pytest.approx(node, abs=0.05)
    traffic = plan.traffic()
    assert (traffic[1:, 1].sum((0, 1)) == plan.bounds.ingress).all()
    assert max(traffic[1:3].sum((0, 1)).max(), traffic[3].sum(0).max()) <= 512 << 20


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-32b", 32_762_123_264),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_shipped_configs_have_the_published_number_of_parameters(name, parameters):
    plan = make_plan(big(name), Grid(), EngineGrid(), Placement.consecutive(1, 1, True), bucket_bytes=1 << 40)
    assert plan.bounds.full == 2 * parameters
    assert plan.bounds.ingress.max() == 0


def test_235b_over_512_ranks_is_planned():
    learner = Grid(4, 8, 16, ep=32, etp=1, first_stage_layers=11, last_stage_layers=11)
    plan = make_plan(big("qwen3-235b-a22b"), learner, EngineGrid(8, 8, 64), Placement.consecutive(512, 512, True))
    assert (plan.traffic()[1:, 1].sum((0, 1)) == plan.bounds.ingress).all()


def test_one_process_sees_its_own_tasks_in_the_same_order():
    plan = make_plan(
        tiny(vocab=1000), Grid(2, 2, 2), EngineGrid(4, count=2), Placement.consecutive(8, 8, False, 4), 5000
    )
    whole = plan.tasks()
    for process in range(16):
        mine = (whole.source == process) | (whole.destination == process)
        part = plan.tasks(process)
        for name in vars(whole):
            assert (getattr(part, name) == getattr(whole, name)[mine]).all()
    again = make_plan(
        tiny(vocab=1000), Grid(2, 2, 2), EngineGrid(4, count=2), Placement.consecutive(8, 8, False, 4), 5000
    )
    assert all((getattr(again.tasks(), name) == getattr(whole, name)).all() for name in vars(whole))


@pytest.mark.parametrize(
    ("learner_tp", "engine_tp", "ffn", "expected"),
    [(8, 8, 25600, "before"), (4, 8, 25600, "before"), (16, 8, 25600, "after"), (8, 16, 25600, "refused")],
)
def test_fp8_alignment_is_decided_by_the_plan(learner_tp, engine_tp, ffn, expected):
    model = Architecture(
        FAMILIES["Qwen3ForCausalLM"], 1, 256, ffn, 64, 16, 128, 512, 16, 1e-6, 1e4, None, False, qk_norm=True
    )
    arguments = (
        model,
        Grid(tp=learner_tp),
        EngineGrid(engine_tp),
        Placement.consecutive(learner_tp, engine_tp, False),
    )
    if expected == "refused":
        with pytest.raises(ValueError, match="lower the engines' tp"):
            make_plan(*arguments, dtype="fp8")
        return
    plan = make_plan(*arguments, dtype="fp8")
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    assert gate.quantise == expected
    assert gate.item_size == {"before": 1, "after": 2}[expected]
    scales = tensors.get("model.layers.0.mlp.gate_proj.weight_scale_inv")
    assert (scales.shape if scales else None) == {"before": (200, 2), "after": None}[expected]
    assert tensors["model.embed_tokens.weight"].quantise is None
    received = plan.traffic()[1:, 1].sum((0, 1))
    assert (received == plan.bounds.ingress).all()


def test_a_bucket_smaller_than_one_row_is_refused():
    with pytest.raises(ValueError, match=r"bucket_bytes=8 .* raise it"):
        make_plan(tiny(), Grid(tp=2), EngineGrid(2), Placement.consecutive(2, 2, False), bucket_bytes=8)


def test_placement_must_fit_the_layouts():
    with pytest.raises(ValueError, match="placement is for 2 learner"):
        make_plan(tiny(), Grid(tp=4), EngineGrid(2), Placement.consecutive(2, 2, False))
