"""The figures that the documentation quotes: Sparing against peers, both sides in one run on one machine.

`train.run(figure, **options)` is the way in. Every side lives in a process of its own (`worker`) and the sides take turns,
so that a noisy machine is noisy for both; peers (`peer`, `yardstick`) get the best of their own settings, whatever the number format
(`trials`). Work is done in workers alone: the process that the user started only waits, so that it can stop at the figure's limit
(`limit`) and at an interruption. `throughput` is figure 1, `quality` figure 2, `gpu` figure 3; `report` turns what was measured into
rows and a table.
"""
