"""Many runs side by side: cells, the processes that run them, and the rows they result in.

It adds nothing to what a single run computes; every cell is a run folder like any other.
"""
