"""The wire format: bytes in, frames out; no socket, no tensor, no clock.

In reading order:

    format.py   what a frame looks like in bytes
    decoder.py  finds frames in bytes, however they are cut
    records.py  the records of the control connections
"""
