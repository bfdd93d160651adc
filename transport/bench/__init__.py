"""`python -m transport.bench`: latency and bandwidth, beside gloo's bare calls.

In reading order:

    __main__.py  the command and its table
    measure.py   the two processes, which take turns with all transports
    links.py     a transport between the two, and what is timed over it
"""

import warnings

# torch warns at its import that NumPy is missing, which it does not need here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
