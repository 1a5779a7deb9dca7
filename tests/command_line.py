"""``isentrope`` called in this process, as a user would."""

import json

from launchers.cli.main import run


def call(capsys, *words):
    """Exit code, standard output, standard error."""
    code = 0
    try:
        run([str(word) for word in words])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys, *words):
    """What ``--json`` prints, of a command that succeeds without a word of complaint."""
    code, out, err = call(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)
