"""Claims the folder of a command that starts runs: their run folders, a log beside each, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decoupled_pp.run import folder as run_folder
from decoupled_pp.run.in_progress import JOB_FILE, LOCK_FILE
from decoupled_pp.run.output_folder import OutputFolder, mapping_in


@dataclass(frozen=True, kw_only=True)
class ResultsFolder:
    """A kind of folder that a command fills with runs of its own, a log beside each, and a report."""

    noun: str
    marker: str
    keys: Sequence[str]  # of the mapping in the marker
    reports: Sequence[str]  # files beside the marker

    def claim(self, folder: Path, advice: str, *, resume: bool = False, overwrite: bool) -> None:
        """Make the folder that `--output` names, or take over an earlier one; raises UsageError if it may not."""
        output = OutputFolder(
            path=folder,
            noun=self.noun,
            marker=self.marker,
            is_one=self._is_one,
            written=self._written,
            if_it_exists=advice,
            elsewhere="give another --output",
        )
        output.check(resume=resume, overwrite=overwrite)
        for run in _runs_in(folder):
            run_folder.refuse_running(run)
        output.make(empty=not resume)

    def _is_one(self, folder: Path) -> bool:
        return mapping_in(folder / self.marker, self.keys) and not (folder / JOB_FILE).exists()

    def _written(self, folder: Path) -> list[Path]:
        found = [folder / name for name in (self.marker, *self.reports)]
        for run in _runs_in(folder):
            found += [*run_folder.written(run), run / LOCK_FILE, run.with_name(f"{run.name}.log")]
        return found


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"*/{JOB_FILE}")]


COMPARISON = ResultsFolder(
    noun="folder of a comparison",
    marker=run_folder.CONFIG_FILE,
    keys=run_folder.SETTINGS,
    reports=("compare.json", "compare.md", "report.html"),
)
SWEEP = ResultsFolder(
    noun="folder of a sweep",
    marker="sweep.yaml",
    keys=("config", "variants"),
    reports=("sweep.json", "sweep.md", "sweep.png"),
)
