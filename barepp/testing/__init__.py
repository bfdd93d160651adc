"""Test your own script: let a rank fail at a chosen action, and check what every rank was told.

In reading order:

    fault_run.py  `run_with_fault`
    leaks.py      counts what a run left behind: processes, threads, descriptors, memory
"""

from barepp.testing.fault_run import FaultOutcome, Survivor, run_with_fault

__all__ = ["FaultOutcome", "Survivor", "run_with_fault"]
