"""The first function of a rank's process; it does not import torch itself."""

from __future__ import annotations

from barepp.worker.spec import Assignment, Pipes


def be_rank(assignment: Assignment, pipes: Pipes) -> None:
    """Enter a worker process: the target that multiprocessing is given."""
    from barepp.worker.main import main  # imports torch, which the fork server has done already

    main(assignment, pipes)
