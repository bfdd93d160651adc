"""Lets a rank fail at a chosen action, for tests of failures.

In reading order:

    kinds.py       what can happen to a rank: signals, exits, exceptions, hangs, delays
    fault_hook.py  makes it happen at a chosen step and action
"""
