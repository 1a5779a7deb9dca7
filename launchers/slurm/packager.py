"""A nemo-run packager that ships an archive which is already made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_run.core.packaging.base import Packager


@dataclass(kw_only=True)
class ArchivePackager(Packager):
    """Ships ``archive``, a .tar.gz; nemo-run unpacks it into the job's ``code`` folder."""

    archive: str

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """See ``Packager``."""
        return str(shutil.copy(self.archive, Path(job_dir) / f"{name}.tar.gz"))
