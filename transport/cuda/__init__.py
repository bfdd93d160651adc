"""CUDA: a GPU for the transports, and payloads from GPU to GPU within a host.

In reading order:

    device.py        the GPU that CUDA gives
    transport.py     `CudaIpcTransport`: payloads from GPU to GPU within a host
    ipc_sender.py    memory of the receiver's GPU, as its sender uses it
    ipc_receiver.py  the receiver's side of that memory
    driver.py        CUDA's driver, by ctypes: memory that processes share
    dlpack.py        a torch tensor over memory that torch did not allocate

Not yet run on hardware.
"""
