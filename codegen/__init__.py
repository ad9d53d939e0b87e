"""Regions and kernel specs in, callables and source text out."""
