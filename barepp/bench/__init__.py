"""Benchmarks beside what one would use instead: `python -m barepp.bench NAME`.

In reading order:

    training.py  step time, beside torch.distributed.pipelining
    bubbles.py   the bubble of each schedule, with stages that sleep
    start.py     from the command to the first barrier
    growth.py    many bare processes at one rendezvous
    case.py      the models that are trained
    figures.py   medians, tables, the machine
    teams/       the processes that are compared, and who gives them turns
    faults/      who is told of a failure, and when
    __main__.py  the command
"""
