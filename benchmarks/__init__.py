"""Benchmarks: how long rounds, server steps and starts take, what memory they need, how they scale.

They are not tests: nothing here passes or fails, and figures hold for the machine that they name.
"""
