"""Zoos: networks on disk, how they are made, converted, read in batches and augmented."""
