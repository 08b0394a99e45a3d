"""Learned optimisers: networks that read a network under training, and compute its next update."""
