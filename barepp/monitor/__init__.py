"""Look at a job from outside: its state, its rates, its Python stacks.

In reading order:

    status.py         the state of a job and of its ranks, as records
    status_socket.py  the Unix socket at which a launcher answers this user's other processes
    client.py         finds the running jobs of this user and asks their launchers
    stacks.py         every rank's Python stack, from outside
    rates.py          rates, CPU and memory, from two looks at a job
    table.py          the table of ranks that `barepp.top` shows
    terminal.py       draws a table over the one before

The commands are barepp/top.py and barepp/stacks.py.
"""
