"""The first function of a rank's process; the launcher names it without importing torch."""

from barepp.worker.spec import Assignment, Pipes


def be_rank(assignment: Assignment, pipes: Pipes) -> None:
    """Be a rank: the target that multiprocessing is given, as a process's first function."""
    from barepp.worker.main import main  # imports torch, which the fork server has done already

    main(assignment, pipes)
