import json
from pathlib import Path

import pytest

from pipeline.config.schema import DataConfig, EntropyConfig, EvaluationConfig, RolloutConfig, RunConfig, SourceConfig
from pipeline.data import DataError
from pipeline.data.sources import PromptSet, check_prompts, load_prompts, template_text
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rewards.verifier import UnknownVerifierError, make_verifier

PM4 = Path(__file__).resolve().parents[4] / "configs/model/pm4-100k"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PM4)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One token per byte: enough for any text."""
    import tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"})
    )
    return load_tokenizer(folder)


def load(tokenizer, *, max_prompt_tokens=1000, held_out=0.1, **settings):
    source = {k: settings.pop(k) for k in list(settings) if k in ("kind", "task", "path", "size", "seed", "params")}
    config = DataConfig(source=SourceConfig(**source), held_out=held_out, **settings)
    return load_prompts(config, tokenizer, max_prompt_tokens=max_prompt_tokens)


def write(path, *items):
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return str(path)


def question(i, **changes):
    return {"id": f"q{i}", "prompt": f"{i}+1=", "answer": str(i + 1), "verifier": "exact"} | changes


def test_countdown(tokenizer):
    prompts = load(tokenizer, task="pm4")
    assert (len(prompts.train), len(prompts.held_out), prompts.dropped_too_long) == (2527, 308, 0)
    first = prompts.train[0]
    assert (first.id, first.text, first.answer, first.verifier) == ("pm4/1111,00", "1111,00=", "1111,00", "countdown")
    assert first.token_ids == (1, 1, 1, 1, 14, 0, 0, 13)
    assert not {p.id for p in prompts.train} & {p.id for p in prompts.held_out}


def test_too_long_prompts_are_counted(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", question(1), question(2, prompt="1" * 11), question(3))
    prompts = load(tokenizer, kind="jsonl", path=path, max_prompt_tokens=10, held_out=0.0)
    assert ([p.id for p in prompts.train], prompts.dropped_too_long) == (["q1", "q3"], 1)
    with pytest.raises(DataError, match=r"3 exceed rollout\.max_prompt_tokens=2"):
        load(tokenizer, kind="jsonl", path=path, max_prompt_tokens=2)


def test_a_prompt_that_the_model_cannot_take_is_named(tmp_path):
    import shutil

    import tokenizers

    shutil.copytree(PM4, tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    backend.add_special_tokens(["<tool>"])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    path = write(tmp_path / "a.jsonl", question(1), question(2, prompt="<tool>1="))
    with pytest.raises(DataError, match=r"prompt 'q2': token '<tool>' .* id 16, beyond the model's vocabulary of 16"):
        load(load_tokenizer(tmp_path / "model"), kind="jsonl", path=path)


def test_answer_tags_that_are_special_tokens_reach_the_verifier(tmp_path):
    import shutil

    import numpy as np
    import tokenizers

    shutil.copytree(PM4, tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    backend.add_special_tokens(["<answer>", "</answer>"])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "model")
    ids = backend.encode("<answer>12</answer>", add_special_tokens=False).ids
    (text,) = tokenizer.decode_batch([np.array([*ids, *tokenizer.eos_token_ids, tokenizer.pad_token_id])])
    assert text.replace(" ", "") == "<answer>12</answer>"


def test_a_growing_file_keeps_its_split(tokenizer, tmp_path):
    def held_out(n):
        path = write(tmp_path / "a.jsonl", *(question(i) for i in range(n)))
        return {p.id for p in load(tokenizer, kind="jsonl", path=path, held_out=0.25).held_out}

    small, large = held_out(200), held_out(400)
    assert small == {i for i in large if int(i[1:]) < 200}
    assert 0.15 < len(large) / 400 < 0.35


def test_jsonl_messages_and_overrides(byte_tokenizer, tmp_path):
    messages = [{"role": "user", "content": "Is 2 even?"}]
    item = {"id": 7, "messages": messages, "answer": ["yes"], "verifier": "math", "meta": {"level": 1}}
    path = write(tmp_path / "a.jsonl", item, "", question(1))
    config = {"kind": "jsonl", "path": path, "verifier": "exact", "system_prompt": "Be brief.", "held_out": 0.0}
    chat, plain = load(byte_tokenizer, **config).train
    assert (chat.id, chat.text, chat.verifier) == ("7", "<system>Be brief.<user>Is 2 even?<assistant>", "exact")
    assert (chat.meta, chat.answer, plain.text) == ({"level": 1}, ["yes"], "1+1=")
    assert byte_tokenizer.encode_rendered(chat.text) == chat.token_ids
    _, rendered = load(byte_tokenizer, chat_template=True, **config).train
    assert rendered.text == "<system>Be brief.<user>1+1=<assistant>"


def test_examples_are_earlier_turns(byte_tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", question(1))
    config = {"kind": "jsonl", "path": path, "held_out": 0.0, "examples": [["0+1=", "1"]]}
    (prompt,) = load(byte_tokenizer, chat_template=True, **config).train
    assert prompt.text == "<user>0+1=<assistant>1<user>1+1=<assistant>"


MALFORMED = [
    ("{", "not JSON"),
    (b"\xff\xfe", "not UTF-8: byte 0xff at position 0; save the file as UTF-8"),
    (json.dumps(question(1)).encode("utf-16-be"), "not JSON"),  # Python's reader would guess
    ("[1]", "must be a JSON object, not list"),
    (question(1, id=""), "'id' must be"),
    (question(1, id=None), "'id' must be"),
    (question(1, anwser=1), "unknown key 'anwser', nearest is 'answer'"),
    ({k: v for k, v in question(1).items() if k != "answer"}, "'answer' is missing"),
    ({k: v for k, v in question(1).items() if k != "verifier"}, "'verifier' is missing"),
    ({k: v for k, v in question(1).items() if k != "prompt"}, "exactly one of 'prompt' and 'messages'"),
    (question(1, messages=[]), "exactly one of 'prompt' and 'messages'"),
    (question(1, prompt=3), "'prompt' must be a non-empty string, not 3"),
    (question(1, verifier="exct"), "unknown verifier 'exct': nearest is 'exact'"),
    (question(1, verifier="no_such_module:f"), "module 'no_such_module' is not found"),
    (question(1, meta=[]), "'meta' must be an object"),
    ({"id": "m", "messages": [], "answer": 1, "verifier": "exact"}, "'messages' must be a non-empty list"),
    ({"id": "m", "messages": [{"role": "robot"}], "answer": 1, "verifier": "exact"}, "each message needs a 'role'"),
    ({"id": "m", "messages": [{"role": "user"}], "answer": 1, "verifier": "exact"}, "'role' and 'content'"),
    (question(1, answer=None), "answer None: None is neither text nor a number"),
    (question(1, answer={"value": 12}, verifier="math"), "answer {'value': 12} is no mathematical expression"),
    (question(1, answer="Z", verifier="choice"), "answer 'Z' is no choice: give a letter from A to T"),
    (question(1, answer="10^{10^{10^{10}}}", verifier="math"), "no verdict within"),
    (question(1, verifier="reasoning_gym"), "meta lacks dataset, entry, params"),
    (question(0), "duplicate id 'q0', first on line 1"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_malformed_lines_are_reported_with_file_and_line(tokenizer, tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(json.dumps(question(0)).encode() + b"\n\n" + raw + b"\n")
    with pytest.raises(DataError) as error:
        load(tokenizer, kind="jsonl", path=str(path))
    assert "1 malformed line" in str(error.value)
    assert f"{path}:3: " in str(error.value)
    assert reason in str(error.value)


def test_ten_malformed_lines_are_described_and_the_rest_counted(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", question(0), *(f'{{"x{n}": 1}}' for n in range(14)))
    with pytest.raises(DataError) as error:
        load(tokenizer, kind="jsonl", path=path)
    lines = str(error.value).splitlines()
    assert "14 malformed lines" in lines[0]
    assert len(lines) == 12
    assert lines[-1] == "  ... and 4 more"
    path = write(tmp_path / "a.jsonl", question(0), *["{"] * 14)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON: .* \(and 13 more lines, the last 15\)$"):
        load(tokenizer, kind="jsonl", path=path)


def test_prompts_that_cannot_carry_the_run(tokenizer):
    prompts = load(tokenizer, task="pm2")
    none_apart = PromptSet(prompts.train, (), 3)

    def check(prompts, per_step=16, **evaluation):
        rollout = RolloutConfig(prompts_per_step=per_step)
        check_prompts(prompts, RunConfig(rollout=rollout, evaluation=EvaluationConfig(**evaluation)))

    train = len(prompts.train)
    check(prompts, train)
    with pytest.raises(DataError, match=rf"rollout\.prompts_per_step={train + 1} exceeds the {train} .* lower it"):
        check(prompts, train + 1)
    check(none_apart, every=0, at_start=False, at_end=False)
    apart = len(prompts.held_out)
    check_prompts(
        prompts, RunConfig(rollout=RolloutConfig(prompts_per_step=16), entropy=EntropyConfig(repeated_prompts=apart))
    )
    with pytest.raises(
        DataError, match=rf"repeated_prompts={apart + 1} exceeds the {apart} held-out .* raise data\.held_out"
    ):
        check_prompts(
            prompts,
            RunConfig(rollout=RolloutConfig(prompts_per_step=16), entropy=EntropyConfig(repeated_prompts=apart + 1)),
        )
    for wanted in ({"every": 5}, {"at_start": True}, {"at_end": True}):
        (key,) = wanted
        said = rf"data\.held_out=0\.1 leaves .* but evaluation\.{key}={wanted[key]}: raise data\.held_out"
        with pytest.raises(DataError, match=said):
            check(none_apart, **({"every": 0, "at_start": False, "at_end": False} | wanted))


def test_missing_and_empty_sources_and_unknown_verifiers(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(tokenizer, kind="jsonl", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="the file is empty"):
        load(tokenizer, kind="jsonl", path=write(tmp_path / "a.jsonl", ""))
    with pytest.raises(UnknownVerifierError, match="nearest is 'math'"):
        load(tokenizer, verifier="mth")


def test_reasoning_gym(byte_tokenizer):
    settings = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "size": 300,
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    }
    prompts = load(byte_tokenizer, seed=3, **settings)
    both = prompts.train + prompts.held_out
    assert len({p.text for p in both}) == len(both) < 300  # 10 * 10 * 2 possible questions, each kept once
    assert load(byte_tokenizer, seed=3, **settings) == prompts
    assert load(byte_tokenizer, seed=4, **settings) != prompts
    verifier = make_verifier("reasoning_gym")
    for prompt in both[:20]:
        assert json.loads(json.dumps(prompt.meta)) == prompt.meta
        assert verifier.score(prompt, prompt.answer) == 1.0
        assert verifier.score(prompt, f"I think <answer> {prompt.answer} </answer>") == 1.0
        assert verifier.score(prompt, prompt.answer + "1") < 1.0


def test_a_dataset_whose_scorer_rewards_nonsense_is_refused(byte_tokenizer):
    with pytest.raises(DataError, match=r"game_of_life_halting gives 1 to .*: choose another"):
        load(byte_tokenizer, kind="reasoning_gym", task="game_of_life_halting", size=3)


def test_reasoning_gym_errors(byte_tokenizer):
    def gym(task="chain_sum", **settings):
        load(byte_tokenizer, kind="reasoning_gym", task=task, size=settings.pop("size", 5), **settings)

    with pytest.raises(DataError, match="'chain_sums' is no reasoning-gym dataset; nearest: chain_sum"):
        gym("chain_sums")
    with pytest.raises(DataError, match=r"params\.min_term: chain_sum has no such parameter; nearest: min_terms"):
        gym(params={"min_term": 2})
    with pytest.raises(DataError, match=r"refuses them: max_terms must be >= min_terms"):
        gym(params={"min_terms": 5, "max_terms": 2})
    with pytest.raises(DataError, match="chain_sum refuses them"):
        gym(params={"min_terms": "two"})
    with pytest.raises(DataError, match=r"data\.source\.size=0"):
        gym(size=0)
    with pytest.raises(DataError, match="JSON cannot carry"):
        gym("rearc")


def test_a_packaged_chat_template_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "<|im_start|>" in template_text("recipe/smollm2_chain_sum.j2")


def test_a_chat_template_file_and_its_variables_reach_the_prompt(byte_tokenizer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ opening }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    config = {"kind": "jsonl", "path": write(tmp_path / "q.jsonl", question(1)), "held_out": 0.0, "chat_template": True}
    more = {"chat_template_file": str(template), "chat_template_kwargs": {"opening": "so: "}, "system_prompt": "s"}
    (prompt,) = load(byte_tokenizer, **config, **more).train
    assert prompt.text == "so: [system]s[user]1+1="
    with pytest.raises(DataError, match=r"chat_template_file=.*absent\.jinja: cannot be read"):
        load(byte_tokenizer, **config, chat_template_file=str(tmp_path / "absent.jinja"))


@pytest.mark.parametrize(("key", "meant"), [("question", "prompt"), ("ground_truth", "answer"), ("solution", "answer")])
def test_what_other_data_sets_call_a_key(tokenizer, tmp_path, key, meant):
    path = write(tmp_path / "q.jsonl", {"id": 1, key: "1"})
    with pytest.raises(DataError, match=f"unknown key '{key}', nearest is '{meant}'"):
        load(tokenizer, kind="jsonl", path=path)


def test_a_countdown_source_in_its_order_begins_with_few_different_digits(tokenizer):
    shuffled, ordered = (load(tokenizer, order=order) for order in ("shuffled", "source"))
    different = [len(set(prompt.text.split(",")[0])) for prompt in ordered.train]
    assert different == sorted(different)
    assert (different[0], different[-1]) == (1, 4)
    for one, other in ((shuffled.train, ordered.train), (shuffled.held_out, ordered.held_out)):
        assert {prompt.id for prompt in one} == {prompt.id for prompt in other}
