"""Benchmarks: what an adapter learns, forgets and costs on real data."""
