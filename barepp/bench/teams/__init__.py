"""The processes that a benchmark compares, and the conductor that gives them turns.

In reading order:

    conductor.py    starts the teams and calls their members in turns
    member.py       a process that waits for its turn
    barepp_rank.py  a rank of barepp
    torch_rank.py   a rank of torch.distributed.pipelining over gloo
    one_process.py  one process without a pipeline
"""
