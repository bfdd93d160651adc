"""A message: from a tensor to bytes and back, and the receive that it meets.

In reading order:

    specs.py        dtypes and shapes: a message's metadata
    tensors.py      the only place where a tensor becomes bytes and back
    work.py         a send or a receive that is not complete yet
    mailbox.py      an arriving message meets the receive that wants it
    gpu_mailbox.py  the same where a rank has a GPU: where each part comes to lie
"""
