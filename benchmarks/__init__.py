"""Benchmarks: named workloads, timed only after their correctness gate."""
