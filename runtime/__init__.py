"""Program in, training step out. This floor knows no FX graph: only actions, tensors and source text."""
