"""Records the code that a job runs: the working tree as it is now, as a commit and a patch.

nemo-run's ``GitArchivePackager`` packs committed files only; what was tried five minutes ago would not be what runs.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where programs keep passwords, keys and tokens; a path begins with "/".
_SECRET_FILE = re.compile(
    r"/\.env(\.|$)|/[._]netrc$|/\.(pgpass|pypirc|npmrc|git-credentials|htpasswd|my\.cnf|s3cfg)$"
    r"|/id_(rsa|dsa|ecdsa|ed25519)|\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)$"
    r"|/\.(aws|ssh|gnupg|kube|azure|docker|gcloud|huggingface|config/gcloud)/"
    r"|(credential|secret|token|service.account)s?(\.|$)",
    re.I,
)
PACKAGES = ("configs", "launchers", "megatron_ext", "pipeline")


@dataclass(frozen=True)
class Code:
    """A source tree: the files that make it up and where it came from."""

    root: Path
    files: tuple[str, ...]  # relative to root
    commit: str  # "" outside a git checkout
    patch: str  # uncommitted changes to tracked files, and every untracked file, as `git diff --binary`
    left_out: tuple[str, ...] = ()  # untracked files that look like secrets: in neither

    @property
    def described(self) -> str:
        """One line: commit and whether there is more."""
        if not self.commit:
            return f"{len(self.files)} files of {self.root}, not a git checkout"
        changes = f" + {len(self.patch.splitlines())} lines of uncommitted changes" if self.patch else ""
        secrets = f"; left out, since they look like secrets: {', '.join(self.left_out)}" if self.left_out else ""
        return f"commit {self.commit[:12]}{changes}, {len(self.files)} files{secrets}"

    def pack(self, target: Path, beside: dict[str, str]) -> None:
        """Write a .tar.gz of the tree with the texts of ``beside`` (path: content) added."""
        with tarfile.open(target, "w:gz", compresslevel=1) as archive:
            for name in self.files:
                archive.add(self.root / name, arcname=name, recursive=False)
            for name, content in beside.items():
                data = content.encode()
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    def record(self) -> str:
        """The JSON that goes with the code."""
        return (
            json.dumps({"commit": self.commit, "changed": bool(self.patch), "files": len(self.files)}, indent=1) + "\n"
        )


def collect(root: Path = ROOT) -> Code:
    """The tree at ``root``: tracked files as they are on disk and untracked ones that git does not ignore.

    Untracked files that look like secrets stay behind. Outside a git checkout (an installed wheel): the packages' own
    files.
    """
    if not (root / ".git").exists():
        found = [path for name in PACKAGES for path in sorted((root / name).rglob("*"))]
        files = [str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts]
        return Code(root, tuple(files), "", "")
    untracked = _listed(root, "--others", "--exclude-standard")
    left_out = tuple(name for name in untracked if _SECRET_FILE.search(f"/{name}"))
    kept = [name for name in untracked if name not in left_out]
    files = sorted({name for name in (*_listed(root, "--cached"), *kept) if (root / name).is_file()})
    return Code(root, tuple(files), _git(root, "rev-parse", "HEAD").strip(), _patch(root, kept), left_out)


def _listed(root: Path, *options: str) -> list[str]:
    return [name for name in _git(root, "ls-files", "-z", *options).split("\0") if name]


def _patch(root: Path, untracked: Sequence[str]) -> str:
    """Everything that `git apply` needs to make the tree from the commit."""
    parts = [_git(root, "diff", "--binary", "HEAD")]
    # diff exits with 1 where files differ, which an absent file always does.
    parts += [_git(root, "diff", "--binary", "--no-index", "--", "/dev/null", name, expect=1) for name in untracked]
    return "".join(parts)


def _git(root: Path, *words: str, expect: int = 0) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode not in (0, expect):
        raise RuntimeError(f"git {words[0]} in {root} failed: {done.stderr.strip()}")
    return done.stdout
