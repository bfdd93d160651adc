"""Payloads in memory that two ranks of a host share.

In reading order:

    transport.py  `ShmTransport`: the socket transport, large payloads beside it
    arena.py      how a block of memory is lent and comes back
"""
