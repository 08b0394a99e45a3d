"""Pages and explanations: what networks, zoos and trained models look like."""
