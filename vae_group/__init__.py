"""Turns latents into frames on the decoding ranks."""
