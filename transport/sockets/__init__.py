"""The socket transport: one stream a pair of ranks, TCP or Unix.

In reading order:

    transport.py     `TcpTransport` and `UnixTransport`
    connection.py    one stream: tensors to frames, frames to the mailbox, and how it ends
    event_loop.py    which thread moves the bytes: one that waits, or a background thread
    buffer_pool.py   memory of large received messages, used again
    peers.py         brings the one connection to each peer into being: dials, or is dialled
    listener.py      lets in only processes that hold the job's secret
    handshake.py     the proof of that, in both directions
    addresses.py     where a rank listens; abstract Unix names and TCP
    reachability.py  finds a host that acknowledges nothing any more
    copy_thread.py   a thread that copies payloads, in the order of their frames
    gpu_stager.py    GPU tensors over a stream, by pinned memory
"""
