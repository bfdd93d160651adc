"""`python -m transport.bench`: latency and bandwidth, beside gloo's bare calls.

In reading order:

    __main__.py  the command
    links.py     what is measured, and the table
"""
