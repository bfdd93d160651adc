"""Start ranks, watch them, and end the job with one cause: `python -m barepp.launch`.

In reading order:

    __main__.py       the command
    job.py            the launcher's loop
    job_state.py      what it knows of the ranks and of other nodes
    referee.py        which rank failed first
    hang_detector.py  finds a job that hangs, from what every rank says of itself
    report.py         what the launcher prints of a failure
    output.py         shows the ranks' output line by line, and keeps it
    status_server.py  answers `barepp.top` and `barepp.stacks`
    run.py            `barepp.run`: ranks from Python
    threads.py        ranks as threads of this process
    processes/        how the ranks' processes are started and what the launcher knows of them
    hosts/            launchers on several hosts
"""
