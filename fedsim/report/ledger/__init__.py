"""A ledger: many methods on one stream or several, as one page that sorts and filters.

    from fedsim.report import ledger
    ledger.write(ledger.read(["runs/my_sweep"]), "ledger.html")

`study` says what is in it, `methods` what is known of a method from its parts, `rows` what is counted, `charts` how it is drawn,
`page` makes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsim.core.files import held, write_atomic
from fedsim.report.ledger.study import Study, read

__all__ = ["Study", "Written", "read", "write"]


@dataclass(frozen=True)
class Written:
    """What was written: the page, its size in bytes, and how many methods and runs it shows."""

    path: Path
    size: int
    methods: int
    runs: int


def write(study: Study, path: str | Path | None = None) -> Written:
    """Write the page to `path` (default: where the study says). Raises StorageError; InUse while another writes it."""
    from fedsim.report.ledger import page
    from fedsim.report.ledger.rows import Ledger

    target = Path(path or study.output).absolute()
    with held(target, "fedsim ledger", file=True):
        ledger = Ledger.of(study)
        content = page.render(ledger).encode()
        write_atomic(target, content, "free space, then try again")
    return Written(target, len(content), len(ledger.methods), ledger.runs)
