"""Measure what each rank did and when, and explain where a step's time went.

In reading order:

    recorder.py         what a rank measures of its own steps
    collect.py          gathers all ranks' records at rank 0, and writes them
    clock_sync.py       how far each rank's clock is ahead of rank 0's
    optimizer_hooks.py  records the optimizer's steps
    device_clock.py     when a GPU reached a moment, not when that was asked of it
    device_recorder.py  the recorder on a GPU
    chrome_format.py    a trace as a file of Chrome trace events
    chrome_reader.py    such a file read back
    analysis.py         what a trace says: measured timeline, bubble, transfers
    step_breakdown.py   the table of where a step's time went
    summary.py          all ranks' times, as sums, without a trace

The command is barepp/timeline.py.
"""
