"""What `sparing bench` measures on the user's own machine: speed, memory and quality, and what was predicted of them.

`figures.bench` is the entry point. Each side of a figure works in a process of its own (`worker`), and the sides take turns,
so that a busy machine is busy for both. The process that the user started only waits: it can stop at the time limit
(`limit`) and when it is interrupted. Comparisons with other programs need the folder `benchmarks/` of the source tree (`peers`).
"""
