"""Run the studies side by side, and write what they hand back.

Not in `__main__`: a spawned process cannot import from there.
"""

from concurrent.futures import Future, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rto.theory.page import Section, render
from rto.theory.studies import STUDIES
from rto.workers import pool

LONGEST_FIRST = ("dense", "pessimism", "fitting", "search", "identities")


def run_study(name: str, seed: int, quick: bool) -> Section:
    """One study in a process of its own, on one thread: the tables are far too small for more."""
    torch.set_num_threads(1)
    return STUDIES[name](seed, quick)


def run_all(names: tuple[str, ...], seed: int, quick: bool, workers: int, console: Console) -> list[Section]:
    """The named studies, ``workers`` at a time, in the order of the page."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with pool([None] * workers) as processes, Progress(*columns, console=console) as progress:
        jobs: dict[Future[Section], str] = {
            processes.submit(run_study, name, seed, quick): name for name in LONGEST_FIRST if name in names
        }
        bars = {name: progress.add_task(name, total=1) for name in jobs.values()}
        sections = {}
        for job in as_completed(jobs):
            section = sections[jobs[job]] = job.result()
            held = sum(section.checks.values())
            done = f"{section.title}: {held} of {len(section.checks)} checks hold"
            progress.update(bars[jobs[job]], completed=1, description=done)
    return [sections[name] for name in STUDIES if name in sections]


def write(sections: list[Section], folder: Path, *, seed: int, quick: bool) -> Path:
    """Figures as PNG and the page as index.html; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for figure in section.plots:
            (folder / f"{figure.name}.png").write_bytes(figure.png)
    page = folder / "index.html"
    page.write_text(render(sections, seed=seed, quick=quick), encoding="utf-8")
    return page
