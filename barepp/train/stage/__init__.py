"""One stage: consecutive layers, their forward and backward, the same bits whatever the cut.

In reading order:

    stage.py      what forward keeps for backward, and until when
    boundary.py   where autograd's graph ends and starts again
    canonical.py  contiguous and aligned: why the cut cannot change a bit
    seeding.py    random numbers that do not depend on which rank holds the layer
    layers.py     the stage's layers: built and run under their own seeds
    backward.py   a backward whole, or its input and weight gradients separately
    recompute.py  keeps a stage's input only, and runs its forward again
    autocast.py   half precision, and why the cut does not matter then either
"""
