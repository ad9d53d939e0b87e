"""Triton kernels, emitted as text for the shapes of a site: one file a family, `source(...)` each."""
