"""Plan before anything runs: `python -m barepp.plan` draws, simulates and cuts.

In reading order:

    simulate.py      when every action would run, given its cost
    timeline.py      the result: bubble, makespan, what is in flight
    text_chart.py    a timeline as text
    explain.py       what one rank receives, computes and sends, line by line
    theory.py        the papers' formulas for the bubble, to compare with
    chart_layout.py  a timeline as bars and arrows
    chart_image.py   the bars as SVG or PNG, with matplotlib
    colours.py       the colours of the kinds of action
    partition.py     cuts layers into stages, evenly or as told
    layer_costs.py   what layers cost as a stage: milliseconds and bytes
    balance.py       the cut whose slowest stage is fastest
    __main__.py      the command

Pure functions, without torch.
"""
