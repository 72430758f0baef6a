"""Flax networks: a ResNet encoder, a U-Net decoder, and the registry that builds them."""
