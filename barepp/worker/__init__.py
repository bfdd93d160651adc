"""The process of one rank: how it joins its world, what it knows, how it ends.

In reading order:

    world.py          what a rank knows of its job, and its messages
    init.py           `barepp.init()`: how this process gets into its world
    spec.py           what the launcher tells a rank: membership, task, options
    entry.py          the first function of a rank's process
    main.py           the process, from its first line to its end
    process_state.py  the one piece of process state: which world this process belongs to
    failures.py       makes a failure record of an exception
    exits.py          how a failed rank exits: report to the launcher, then exit immediately
    heartbeat.py      what a rank says of itself twice a second
    devices.py        CPU or GPU: what was asked for, what there is, what all ranks agree on
    process.py        settings of the process: parent, terminal, memory, scheduling
    external/         ranks that torchrun or srun has started
    faults/           lets a rank fail at a chosen action, for tests
"""
