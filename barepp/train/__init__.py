"""Train: the pipeline, the executor, and what they need of a batch and a model.

In reading order:

    pipeline.py           `Pipeline`: a model cut into stages, one training step at a time
    batch.py              cuts a batch into microbatches
    executor.py           runs a program: take the input, compute, give the output
    messages.py           how activations and gradients become messages
    stage/                one stage: forward and backward of its layers
    parameters.py         a rank's part of the model, and the SHA-256 of all of it
    shared_parameters.py  checks that no parameter belongs to two stages
    loss_scaler.py        loss scaling for float16: all ranks step, or none
    models.py             the demos' network
    layer_profiler.py     what each layer costs, measured one by one
"""
