"""What a job runs is the tree as it is: commit plus patch give it back."""

import subprocess
import tarfile

import pytest

from launchers.slurm.worktree import collect


def git(root, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "a tree"
    root.mkdir()
    git(root, "init", "-q")
    (root / ".gitignore").write_text("runs/\n")
    for name in ("kept.py", "changed.py", "removed.py"):
        (root / name).write_text(f"{name}\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "changed.py").write_text("new\n")
    (root / "removed.py").unlink()
    (root / "untracked ä.bin").write_bytes(bytes(range(256)))
    (root / "staged.py").write_text("staged\n")
    git(root, "add", "staged.py")
    (root / "runs").mkdir()
    (root / "runs" / "huge.ckpt").write_text("ignored")
    return root


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.parts and "runs" not in path.parts
    }


def test_the_archive_is_the_tree_without_what_git_ignores(tree, tmp_path):
    code = collect(tree)
    code.pack(tmp_path / "code.tar.gz", {".launch/config.yaml": "steps: 1\n"})
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        archive.extractall(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tree) | {".launch/config.yaml": b"steps: 1\n"}


def test_commit_and_patch_give_the_tree_back(tree, tmp_path):
    code = collect(tree)
    assert code.commit == git(tree, "rev-parse", "HEAD").strip()
    git(tmp_path, "clone", "-q", tree, "again")
    (tmp_path / "patch").write_text(code.patch)
    git(tmp_path / "again", "apply", tmp_path / "patch")
    assert contents(tmp_path / "again") == contents(tree)


SECRETS = (
    ".env",
    ".env.local",
    "pipeline/.netrc",
    "id_rsa",
    "deploy/id_ed25519",
    ".aws/credentials",
    "tls.key",
    "hf_token",
)


def test_untracked_secrets_stay_behind_and_are_named(tree):
    for name in (*SECRETS, "tokenizer_notes.py", "monkey.py", "environment.py"):
        (tree / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / name).write_text("hunter2")
    code = collect(tree)
    assert set(code.left_out) == set(SECRETS)
    assert not set(code.files) & set(SECRETS)
    assert code.patch.count("hunter2") == 3
    assert {"tokenizer_notes.py", "monkey.py", "environment.py"} <= set(code.files)
    assert "left out, since they look like secrets: .aws/credentials, .env" in code.described


def test_a_clean_tree_has_no_patch(tree):
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "second")
    code = collect(tree)
    assert code.patch == ""
    assert "uncommitted" not in code.described


def test_without_git_the_packages_are_shipped(tmp_path):
    (tmp_path / "pipeline/__pycache__").mkdir(parents=True)
    (tmp_path / "pipeline/loop.py").write_text("")
    (tmp_path / "pipeline/__pycache__/loop.pyc").write_text("")
    (tmp_path / "other.py").write_text("")
    code = collect(tmp_path)
    assert (code.files, code.commit) == (("pipeline/loop.py",), "")
