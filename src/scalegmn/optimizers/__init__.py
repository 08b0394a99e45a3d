"""Learned optimisers: networks that read a network under training, and say its next update."""
