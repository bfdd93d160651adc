"""Launchers on several hosts: node 0 decides, the others report to it.

In reading order:

    protocol.py            what the launchers say to each other
    head.py                node 0's connections to the other launchers
    node_agent.py          another node's connection to node 0
    rendezvous_process.py  the rendezvous in a process of its own, beside rank 0, under torchrun and
    srun
"""
