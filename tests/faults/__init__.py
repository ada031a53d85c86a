"""The fault campaign: files that are damaged, processes that are killed, calls without end, threads.

`make test` runs a sample of it, `make faults` all of it, which also writes docs/reliability.md.
"""
