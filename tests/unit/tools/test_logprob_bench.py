"""The peers in the log-prob benchmark do the same mathematics: a comparison that starts from other results would be
worth nothing.
"""

import pytest

from tools.bench.logprobs import Case, measure


@pytest.mark.parametrize("hidden", [0, 8])
def test_all_contenders_agree(hidden):
    """``measure`` stops at the first log-prob, entropy or gradient that differs."""
    table = measure(Case("tiny", tokens=600, columns=50, hidden=hidden), 0, None, "cpu", rounds=1)
    paths = {name.rsplit(", ", 1)[0] for name in table}
    assert paths >= {"ours, torch from logits", "slime", "verl", "NeMo-RL"}
    assert ("verl fused" in paths) == ("ours, fused" in paths) == bool(hidden)


def test_a_contender_that_differs_is_caught(monkeypatch):
    from tools.bench import logprob_peers

    monkeypatch.setattr(logprob_peers, "slime", lambda logits, *_: (logits.sum(-1), logits.sum(-1)))
    with pytest.raises(SystemExit, match=r"slime differs from ours by .*: not the same mathematics"):
        measure(Case("tiny", tokens=4, columns=50), 0, None, "cpu", rounds=1)
