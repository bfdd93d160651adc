"""The ranks' processes, as the launcher sees them.

In reading order:

    fork_server.py   imports torch once, then forks the ranks; what else the script will need
    preload.py       what the fork server imports
    rank_process.py  what the launcher knows of one rank's process
    signals.py       Ctrl-C and other signals, told to the launcher's loop
"""
