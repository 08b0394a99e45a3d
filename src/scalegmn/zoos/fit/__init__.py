"""Zoos of your own: SIRENs fitted to images, CNNs trained to classify them."""
