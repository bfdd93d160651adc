"""The contestants' processes, and who tells them when to run.

In reading order:

    conductor.py    starts the teams and asks them in turns
    member.py       what every contestant's rank does
    barepp_rank.py  a rank of barepp
    torch_rank.py   a rank of torch.distributed.pipelining over gloo
    one_process.py  one process without a pipeline
"""
