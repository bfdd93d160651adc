"""`gloo` and `nccl`: payloads over torch.distributed's point-to-point, on request.

In reading order:

    transport.py   the two transports
    off_stream.py  payloads beside the stream, in the order of its frames
"""
