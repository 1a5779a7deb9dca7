import json
import math
import threading
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.config.load import PACKAGED
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model import fp8
from pipeline.model.architecture import parse
from pipeline.model.fp8 import quantise_tensors
from pipeline.reshard.link import Group
from pipeline.rollout.engine import EngineError, WeightUpdateError
from pipeline.rollout.native import engine as native
from pipeline.rollout.native.decoder import Decoder
from pipeline.rollout.native.engine import NativeEngine
from pipeline.types import Cuts, GenerateRequest, Prompt, Role, WeightSpan
from tests import plan_source
from tests.decoding import token_log_probs
from tests.plan_source import Source
from tests.tiny_folder import hf_config, random_tensors, write_folder

EOS = 3
PM4 = PACKAGED / "model/pm4-100k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), "qwen3")[0]


@pytest.fixture
def engine(folder):
    engine = NativeEngine()
    engine.start(folder)
    return engine


def request(tokens, seeds=(1,), temperature=1.0, new=8, role=Role.MAIN):
    return GenerateRequest(Prompt(str(tokens), tuple(tokens), "", None, "exact"), tuple(seeds), temperature, new, role)


def weights(version):
    return random_tensors(hf_config("qwen3"), version)


@pytest.fixture
def source(folder):
    return Source(folder, weights)


@pytest.fixture
def sync(source, engine):
    return source.sync(engine, 20.0)


def begun(sync, version=7):
    """The order of an update that has begun."""
    sync._engines.begin_update(version)
    return sync._order(version)


def mixed_requests():
    """Prompts of four lengths, two temperatures, several limits, one prompt twice."""
    return [
        request([5], range(4), 1.0, 8),
        request([7, 8, 9, 10, 11, 12, 13], range(10, 15), 1.3, 20),
        request([5, 6, 7], range(20, 23), 0.7, 1),
        request([7, 8, 9, 10, 11, 12, 13], range(30, 33), 1.0, 12, Role.AUXILIARY),
        request([40, 41], range(50, 52), 1.0, 30),
    ]


def test_log_probs_are_exact_at_the_drawn_temperature(engine, folder):
    decoder = Decoder(parse(hf_config("qwen3")), random_tensors(hf_config("qwen3"), 0))
    requests = mixed_requests()
    groups = engine.generate(requests)
    assert [g.prompt for g in groups] == [r.prompt for r in requests]
    assert [g.role for g in groups] == [r.role for r in requests]
    for group, wanted in zip(groups, requests, strict=True):
        assert [s.seed for s in group.samples] == list(wanted.seeds)
        for sample in group.samples:
            start = len(wanted.prompt.token_ids)
            tokens = torch.tensor([[*wanted.prompt.token_ids, *sample.token_ids.tolist()]])
            exact = token_log_probs(decoder, tokens, wanted.temperature)[0, start - 1 :]
            np.testing.assert_allclose(sample.log_probs, exact.numpy(), atol=2e-5)
            assert (sample.token_ids.dtype, sample.log_probs.dtype) == (np.int64, np.float32)
            assert sample.temperature == wanted.temperature
            assert sample.weight_versions == (WeightSpan(0, 0, len(sample.token_ids)),)


def test_samples_do_not_depend_on_batching(folder, engine):
    requests = mixed_requests()
    together = engine.generate(requests)
    alone = [engine.generate([r])[0] for r in requests]
    small = NativeEngine(max_batch_rows=2)
    small.start(folder)
    for other in (alone, small.generate(requests), engine.generate(requests[::-1])[::-1]):
        for group, expected in zip(other, together, strict=True):
            for sample, twin in zip(group.samples, expected.samples, strict=True):
                assert sample.token_ids.tolist() == twin.token_ids.tolist()
                assert sample.finish_reason == twin.finish_reason
                np.testing.assert_allclose(sample.log_probs, twin.log_probs, atol=2e-5)


def test_a_sample_depends_on_its_seed_alone(engine):
    prompt = [5, 6, 7]
    first, second = engine.generate([request(prompt, [11, 12, 13, 11], new=20), request(prompt, [12, 99], new=20)])
    texts = [tuple(s.token_ids) for s in first.samples]
    assert texts[0] == texts[3]
    assert texts[1] == tuple(second.samples[0].token_ids)
    assert len({*texts, tuple(second.samples[1].token_ids)}) == 4


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_follow_the_tempered_distribution(engine, temperature):
    prompt, draws = (9, 4, 20), 20_000
    decoder = Decoder(parse(hf_config("qwen3")), random_tensors(hf_config("qwen3"), 0))
    hidden, _ = decoder.prefill(torch.tensor([prompt]))
    probabilities = (decoder.logits(hidden[0, -1]) / temperature).softmax(-1).double().numpy()
    (group,) = engine.generate([request(prompt, range(draws), temperature, new=1)])
    counts = np.bincount([s.token_ids[0] for s in group.samples], minlength=48)
    frequent = probabilities * draws >= 5
    rest = [counts[~frequent].sum()], [probabilities[~frequent].sum() * draws]
    observed, expected = np.append(counts[frequent], rest[0]), np.append(probabilities[frequent] * draws, rest[1])
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1.0)).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_cuts_tokens_are_uniform_and_keep_the_policys_log_probs(engine):
    """After the warm-up; rows that leave the batch early do not shift the rule to others."""
    prompt, draws = (9, 4, 20), 4000
    decoder = Decoder(parse(hf_config("qwen3")), random_tensors(hf_config("qwen3"), 0))
    hidden, _ = decoder.prefill(torch.tensor([prompt]))
    log_p = decoder.logits(hidden[0, -1]).log_softmax(-1)
    allowed = [i for i in log_p.topk(4).indices.tolist() if log_p[i].exp() >= 0.05]
    assert len(allowed) > 1
    asked = replace(request(prompt, range(draws), new=1), cuts=Cuts(draws - 10, 4, 0.05, 0))
    (group,) = engine.generate([asked])
    counts = np.bincount([s.token_ids[0] for s in group.samples[10:]], minlength=48)
    assert set(counts.nonzero()[0]) == set(allowed)
    share = 1 / len(allowed)
    assert (abs(counts[allowed] / (draws - 10) - share) < 5 * math.sqrt(share / draws)).all()
    for sample in group.samples[:20]:
        assert sample.log_probs[0] == pytest.approx(log_p[sample.token_ids[0]].item(), abs=1e-5)
    late = replace(request(prompt, range(40), new=12), cuts=Cuts(20, 1, 0.0, 3))
    (usual,), (greedy,) = engine.generate([request(prompt, range(40), new=12)]), engine.generate([late])
    for i, (a, b) in enumerate(zip(usual.samples, greedy.samples, strict=True)):
        assert a.token_ids[:3].tolist() == b.token_ids[:3].tolist()
        if i < 20:
            assert a.token_ids.tolist() == b.token_ids.tolist()
            continue
        tokens = torch.tensor([[*prompt, *b.token_ids]])
        best = decoder.logits(decoder.prefill(tokens)[0][0]).argmax(-1)[2:-1]  # top 1 of every next token
        assert b.token_ids[3:].tolist() == best[3:].tolist()


def test_finish_reasons(engine):
    (group,) = engine.generate([request([5, 6], range(300), new=12)])
    by_reason = {reason: [s for s in group.samples if s.finish_reason == reason] for reason in ("stop", "length")}
    assert len(by_reason["stop"]) + len(by_reason["length"]) == 300
    assert by_reason["stop"]
    assert by_reason["length"]
    for sample in by_reason["stop"]:
        assert sample.token_ids[-1] == EOS
        assert EOS not in sample.token_ids[:-1]
    for sample in by_reason["length"]:
        assert len(sample.token_ids) == 12
        assert EOS not in sample.token_ids


def test_stop_tokens_come_from_the_folder_unless_given(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    for given_ids, expected in ((None, {7, 8}), ((9,), {9}), ((), set())):
        engine = NativeEngine(eos_token_ids=given_ids)
        engine.start(tmp_path)
        (group,) = engine.generate([request([5, 6], range(200), new=12)])
        assert {int(s.token_ids[-1]) for s in group.samples if s.finish_reason == "stop"} == expected


def test_prompts_are_prefilled_once(engine, monkeypatch):
    seen = []
    original = Decoder.prefill
    monkeypatch.setattr(
        Decoder,
        "prefill",
        lambda self, tokens, *routes: seen.append(tuple(tokens.shape)) or original(self, tokens, *routes),
    )
    engine.generate(mixed_requests())
    assert sorted(seen) == [(1, 1), (1, 2), (1, 3), (1, 7)]


def test_abort_returns_what_there_is(engine, monkeypatch):
    steps = []
    original = Decoder.step

    def step(self, *args):
        steps.append(1)
        if len(steps) == 5:
            engine.abort()
        return original(self, *args)

    monkeypatch.setattr(Decoder, "step", step)
    groups = engine.generate([request([5, 6], range(20), new=400), request([5, 6], [1], new=2)])
    aborted = [s for s in groups[0].samples if s.finish_reason == "abort"]
    assert aborted
    assert {len(s.token_ids) for s in aborted} == {6}
    assert groups[1].samples[0].finish_reason in ("stop", "length")
    monkeypatch.undo()
    monkeypatch.setattr(engine, "_max_batch_rows", 4)
    monkeypatch.setattr(Decoder, "step", lambda *args: engine.abort() or original(*args))
    (waiting,) = engine.generate([request([5, 6], range(20), new=400)])
    assert [len(sample.token_ids) for sample in waiting.samples[4:]] == [0] * 16
    assert all(sample.held for sample in waiting.samples[4:])
    monkeypatch.undo()
    assert engine.generate([request([5, 6], [1], new=20)])[0].samples[0].finish_reason != "abort"


def seen_by(monkeypatch):
    """Bytes of the cache of every step, and its lines."""
    seen, original = [], Decoder.step

    def step(self, tokens, positions, cache, *rest):
        seen.append((sum(part.nbytes for layer in cache for part in layer), len(tokens)))
        return original(self, tokens, positions, cache, *rest)

    monkeypatch.setattr(Decoder, "step", step)
    return seen


def test_rows_that_wait_take_the_place_of_finished_ones_within_the_memory_bound(engine, monkeypatch):
    whole = engine.generate(mixed_requests())
    bound = 6 * 2 * 4 * 2 * 2 * 16 * 37  # six rows of 7 + 30 columns
    monkeypatch.setattr(native, "_CACHE_BYTES", bound)
    seen = seen_by(monkeypatch)
    parts = engine.generate(mixed_requests())
    assert max(size for size, _ in seen) <= bound
    lines = [count for _, count in seen]
    assert any(1 < before < after for before, after in pairwise(lines)), "some joined others"
    assert [[s.token_ids.tolist() for s in g.samples] for g in parts] == [
        [s.token_ids.tolist() for s in g.samples] for g in whole
    ]


@given(
    data=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=6),
    most=st.integers(1, 7),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_room_are_drawn_as_alone(engine, data, most):
    """Prompts of some length, limits, and how many answers of each."""
    asked = [request(range(5, 5 + n), range(100 * i, 100 * i + k), 1.2, new) for i, (n, new, k) in enumerate(data)]
    with mock.patch.object(engine, "_max_batch_rows", most):
        together = engine.generate(asked)
    for group, each in zip(together, asked, strict=True):
        (alone,) = engine.generate([each])
        for sample, twin in zip(group.samples, alone.samples, strict=True):
            assert sample.token_ids.tolist() == twin.token_ids.tolist()
            assert sample.finish_reason == twin.finish_reason
            np.testing.assert_allclose(sample.log_probs, twin.log_probs, atol=2e-5)


def test_a_long_answer_holds_up_neither_the_others_nor_those_that_wait(folder, monkeypatch):
    engine = NativeEngine(eos_token_ids=(), max_batch_rows=4)
    engine.start(folder)
    seen = seen_by(monkeypatch)
    asked = [request([5, 6], [1], new=60), *(request([7, i], [2], new=5) for i in range(10, 22))]
    came = {number: len(seen) for some in engine.stream(asked) for number, _ in some}
    assert sorted(came, key=came.get)[-1] == 0
    assert came[12] < 30, "the last of those that waited"
    assert len(seen) == 59, "all others beside the long one"


def test_update_serves_the_new_weights(engine, sync, tmp_path):
    sync.push(5)
    assert engine.health().weight_version == 5
    other_folder, _ = write_folder(tmp_path, "qwen3", seed=5)
    reference = NativeEngine()
    reference.start(other_folder)
    mine, theirs = engine.generate(mixed_requests()), reference.generate(mixed_requests())
    for group, expected in zip(mine, theirs, strict=True):
        for sample, twin in zip(group.samples, expected.samples, strict=True):
            assert sample.token_ids.tolist() == twin.token_ids.tolist()
            assert sample.drawn_with(5)


def test_update_survives_a_sender_that_reuses_memory(engine, source, sync, monkeypatch):
    sent = []
    original = plan_source.local_parameters
    monkeypatch.setattr(plan_source, "local_parameters", lambda *given: sent.append(original(*given)) or sent[-1])
    order = begun(sync)
    sync._transfer(order)
    for tensor in sent[0].values():
        tensor.fill_(float("nan"))
    engine.verify_update(7)
    engine.commit_update(7)
    assert np.isfinite(engine.generate([request([5, 6])])[0].samples[0].log_probs).all()


def refuses_until_a_whole_update_commits(engine, sync):
    for action in (lambda: engine.verify_update(7), lambda: engine.commit_update(7)):
        with pytest.raises(WeightUpdateError, match="begin_update"):
            action()
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate([request([5, 6])])
    assert engine.health().weight_version is None
    sync.renew()
    sync.push(7)
    assert engine.generate([request([5, 6])])[0].samples[0].drawn_with(7)


def test_a_lost_byte_ends_the_update(engine, sync, monkeypatch):
    original = Group.exchange

    def exchange(self, sends, receives):
        original(self, sends, receives)
        for _, buffer in receives[:1]:
            buffer[len(buffer) // 3] ^= 1

    monkeypatch.setattr(Group, "exchange", exchange)
    with pytest.raises(WeightUpdateError, match=r"receive: DigestError: bytes differ from what process 0 sent"):
        sync._transfer(begun(sync))
    monkeypatch.undo()
    refuses_until_a_whole_update_commits(engine, sync)


def test_another_plan_ends_the_update(engine, sync):
    order = replace(begun(sync), plan_digest="0" * 64)
    with pytest.raises(WeightUpdateError, match="it made another plan"):
        sync._transfer(order)
    refuses_until_a_whole_update_commits(engine, sync)


def test_a_sender_that_fails_ends_the_update(engine, source, sync):
    def fail():
        raise RuntimeError("rank 1 ran out of memory")

    source.before_send = fail
    with pytest.raises(WeightUpdateError, match="rank 1 ran out of memory"):
        sync._transfer(begun(sync))
    source.before_send = lambda: None
    refuses_until_a_whole_update_commits(engine, sync)


def test_a_sender_that_does_not_come_is_named(engine, source):
    sync = source.sync(engine, 0.3)
    with pytest.raises(WeightUpdateError, match=r"learner rank 0 did not come within 0\.3 s"):
        engine.receive(begun(sync))
    refuses_until_a_whole_update_commits(engine, source.sync(engine, 20.0))


def test_another_version_is_refused(engine, sync):
    begun(sync, 7)
    with pytest.raises(WeightUpdateError, match="receive of version 8; finish or restart the update of 7"):
        engine.receive(sync._order(8))
    refuses_until_a_whole_update_commits(engine, sync)


def test_an_update_is_received_once(engine, sync):
    order = begun(sync)
    sync._transfer(order)
    with pytest.raises(WeightUpdateError, match="receive for a second time"):
        engine.receive(order)
    refuses_until_a_whole_update_commits(engine, sync)


@pytest.mark.parametrize(
    ("received", "version", "message"), [(False, 7, "before anything was received"), (True, 8, r"verify_update\(8\)")]
)
def test_a_partial_update_does_not_verify(engine, sync, received, version, message):
    order = begun(sync)
    if received:
        sync._transfer(order)
    with pytest.raises(WeightUpdateError, match=message):
        engine.verify_update(version)
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate([request([5, 6])])


def test_fp8_weights_are_used_at_their_values(engine, folder):
    """What is not quantised stays as the learner has it, in float32."""
    Source(folder, weights, dtype="fp8 fp32").sync(engine).push(7)
    kept = weights(7)
    names = {name for name, tensor in kept.items() if tensor.ndim == 2 and ".layers." in name}
    (group,) = engine.generate([request([5, 6], range(4))])
    decoder = Decoder(parse(hf_config("qwen3")), fp8.values(quantise_tensors(kept, names)))
    rounded = Decoder(parse(hf_config("qwen3")), kept)
    for sample in group.samples:
        tokens = torch.tensor([[5, 6, *sample.token_ids.tolist()]])
        np.testing.assert_allclose(sample.log_probs, token_log_probs(decoder, tokens)[0, 1:].numpy(), atol=1e-5)
        assert np.abs(sample.log_probs - token_log_probs(rounded, tokens)[0, 1:].numpy()).mean() > 1e-3


@pytest.mark.parametrize("version", [7, 8])
def test_only_what_was_verified_commits(engine, sync, version):
    sync._transfer(begun(sync))
    if version == 8:
        engine.verify_update(7)
        assert engine.health().weight_version is None, "verified is not served"
        with pytest.raises(EngineError, match="push the weights again"):
            engine.generate([request([5, 6])])
    with pytest.raises(WeightUpdateError, match=rf"commit_update\({version}\), but what is loaded is version 7"):
        engine.commit_update(version)


def test_nothing_is_received_after_verification(engine, sync):
    order = begun(sync)
    sync._transfer(order)
    engine.verify_update(7)
    with pytest.raises(WeightUpdateError, match="receive for a second time"):
        engine.receive(order)


@pytest.mark.parametrize("until", ["start", "begin", "receive", "verify", "commit"])
def test_after_an_abort_the_next_update_mends(engine, sync, until):
    steps = [
        lambda: engine.begin_update(7),
        lambda: sync._transfer(sync._order(7)),
        lambda: engine.verify_update(7),
        lambda: engine.commit_update(7),
    ]
    for step in steps[: ["start", "begin", "receive", "verify", "commit"].index(until)]:
        step()
    engine.abort_update()
    assert engine.health().weight_version is None
    with pytest.raises(EngineError, match="push the weights again"):
        engine.generate([request([5, 6])])
    sync.push(7)
    assert engine.generate([request([5, 6])])[0].samples[0].drawn_with(7)


def held_batch(engine, monkeypatch):
    """A batch that stands in its first step until ``proceed`` is set; its result is filled by the ``generation``
    thread.
    """
    inside, proceed = threading.Event(), threading.Event()
    original = Decoder.step

    def step(self, *args):
        inside.set()
        proceed.wait(60)
        return original(self, *args)

    monkeypatch.setattr(Decoder, "step", step)
    result = []
    generation = threading.Thread(target=lambda: result.extend(engine.generate([request([5, 6], range(8), new=4)])))
    generation.start()
    inside.wait(60)
    return result, proceed, generation


def test_a_batch_that_does_not_end_is_named(folder, source, monkeypatch):
    engine = NativeEngine(weight_sync_timeout_s=0.1)
    engine.start(folder)
    result, proceed, generation = held_batch(engine, monkeypatch)
    with pytest.raises(
        WeightUpdateError, match=r"version 3: begin_update: .* within 0\.1 s; raise rollout\.weight_sync"
    ):
        engine.begin_update(3)
    proceed.set()
    generation.join(60)
    assert all(sample.drawn_with(0) for sample in result[0].samples)
    source.sync(engine).push(4)
    assert engine.health().weight_version == 4


def test_an_update_waits_for_the_running_batch(engine, monkeypatch):
    result, proceed, generation = held_batch(engine, monkeypatch)
    update = threading.Thread(target=lambda: engine.begin_update(1))
    update.start()
    update.join(0.05)
    assert update.is_alive()
    proceed.set()
    generation.join(60)
    update.join(60)
    assert all(s.drawn_with(0) for s in result[0].samples)
    assert engine.health().weight_version is None


@pytest.mark.parametrize(
    "bad",
    [request([], [1]), request([5], [1], temperature=0.0), request([5], [1], new=0)],
    ids=["empty", "cold", "short"],
)
def test_impossible_requests_are_named(engine, bad):
    with pytest.raises(EngineError, match="at least one prompt token"):
        engine.generate([bad])


def test_start_reads_an_indexed_checkpoint_and_names_what_is_missing(tmp_path):
    _, tensors = write_folder(tmp_path, "qwen2", tie_word_embeddings=True)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, str(tmp_path / file))
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    engine = NativeEngine()
    engine.start(tmp_path)
    assert engine.health().weight_version == 0
    del weight_map["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(EngineError, match=r"model\.norm\.weight"):
        NativeEngine().start(tmp_path)


def test_life_cycle_errors(engine, tmp_path):
    with pytest.raises(EngineError, match=r"config\.json"):
        NativeEngine().start(tmp_path)
    with pytest.raises(EngineError, match="not started"):
        NativeEngine().generate([])
    engine.close()
    engine.close()
    assert engine.health().weight_version is None
    with pytest.raises(EngineError, match="not started"):
        engine.generate([request([5])])


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_those_of_transformers(tmp_path, normalize):
    transformers = pytest.importorskip("transformers")
    folder, tensors = write_folder(tmp_path, "qwen3_moe", norm_topk_prob=normalize)
    tokens = torch.randint(0, 48, (3, 20), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    ours = token_log_probs(Decoder(parse(hf_config("qwen3_moe", norm_topk_prob=normalize)), tensors), tokens)
    assert torch.allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "decoder_sparse_step": 2, "num_hidden_layers": 3}])
def test_samples_carry_the_experts_that_read_each_of_their_tokens(tmp_path, changes):
    """Against one pass over the whole sequence; rows of several lengths, which end at different times."""
    changes = {"num_experts": 8, **changes}
    folder, tensors = write_folder(tmp_path, "qwen3_moe", **changes)
    model = parse(hf_config("qwen3_moe", **changes))
    engine, silent = NativeEngine(record_routes=True, max_batch_rows=9), NativeEngine()
    decoder, used = Decoder(model, tensors), set()
    for each in (engine, silent):
        each.start(folder)
    for group, plain in zip(engine.generate(mixed_requests()), silent.generate(mixed_requests()), strict=True):
        for sample, other in zip(group.samples, plain.samples, strict=True):
            assert np.array_equal(sample.token_ids, other.token_ids)
            assert other.routes is None
            read, routes = [*group.prompt.token_ids, *sample.token_ids][:-1], []
            decoder.prefill(torch.tensor([read]), routes)
            expected = torch.stack([layer[0] for layer in routes], dim=1).sort(-1).values
            assert sample.routes.dtype == np.uint8
            assert np.array_equal(np.sort(sample.routes), expected)
            used |= set(sample.routes.ravel().tolist())
    assert expected.shape[1:] == (sum(model.moe.layers), 2)
    assert len(used) == 8


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_start_refuses_what_it_does_not_compute(tmp_path, family, changes, named):
    folder, _ = write_folder(tmp_path, family)
    (folder / "config.json").write_text(json.dumps(hf_config(family, **changes)))
    with pytest.raises(EngineError, match=named):
        NativeEngine(record_routes=True).start(folder)


def test_stop_texts_and_ids_end_a_response_and_stay_in_it():
    """The run's or a request's. pm4's tokenizer has one digit a token: a text of two characters is found across two
    tokens.
    """
    usual, stopping = NativeEngine(eos_token_ids=()), NativeEngine(eos_token_ids=(), stop=("+1",), stop_token_ids=(3,))
    for each in (usual, stopping):
        each.start(PM4)
    asked = [request(load_tokenizer(PM4).encode("1234,10="), range(200), 1.5, 12)]
    ended = 0
    stopped = stopping.generate(asked)[0].samples
    own, other = usual.generate([replace(asked[0], stop=("+1", "3")), replace(asked[0], stop=("00",))])
    assert [sample.token_ids.tolist() for sample in own.samples] == [sample.token_ids.tolist() for sample in stopped]
    assert any(len(left.token_ids) > len(right.token_ids) for left, right in zip(other.samples, stopped, strict=True))
    for free, sample in zip(usual.generate(asked)[0].samples, stopped, strict=True):
        ids = free.token_ids.tolist()
        plus, one = load_tokenizer(PM4).encode("+1")
        ends = [i for i in range(len(ids)) if ids[i] == 3 or ids[max(0, i - 1) : i + 1] == [plus, one]]
        cut = ends[0] + 1 if ends else len(ids)
        assert sample.token_ids.tolist() == ids[:cut]
        np.testing.assert_allclose(sample.log_probs, free.log_probs[:cut], atol=1e-5)
        assert sample.finish_reason == ("stop" if ends else "length")
        ended += bool(ends)
    assert 20 < ended < 200
