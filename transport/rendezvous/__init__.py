"""How ranks find each other, and how a death is noticed: the control connections.

In reading order:

    server.py          ranks, barriers, which rank is connected
    world_assembly.py  sees the world complete, and hands out the address book
    events.py          what the rendezvous tells its owner
    loop.py            the event loop that the owner serves it with
    barrier.py         a rank's wait at a barrier, and the failure that ends it
    client.py          a rank's end of the control connection
    dial.py            how a rank connects to the rendezvous
"""
