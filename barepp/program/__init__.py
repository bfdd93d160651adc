"""A schedule as data: what each rank does, in which order, and whether that can run.

In reading order:

    actions.py       one thing that a rank does, and its text form `2B1`
    dependencies.py  what each action must wait for: the one graph
    lowering.py      an order becomes a program: who sends what to whom, under which tag
    dry_run.py       runs an order without computing: does it end, and when
    validation.py    says why an order cannot run, with the wrong cell marked

Pure functions, without torch.
"""
