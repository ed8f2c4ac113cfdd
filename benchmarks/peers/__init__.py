"""The same workloads run by other libraries for federated learning, through their own interfaces.

Each lives in an environment of its own; none is ever installed beside fedmerge.
"""
