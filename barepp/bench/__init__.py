"""Benchmarks beside what one would use instead: `python -m barepp.bench NAME`.

In reading order:

    training.py         step time, beside torch.distributed.pipelining
    bubbles.py          the bubble of each schedule, with stages that sleep
    start.py            from the command to the first barrier
    growth.py           rendezvous and step against world size and microbatches
    rendezvous_load.py  many bare processes at one rendezvous, for growth
    case.py             the models that are trained
    figures.py          medians, tables, the machine
    teams/              processes of each contestant, and who conducts them
    faults/             how fast, and with which words, a failure is told
    __main__.py         the command
"""
