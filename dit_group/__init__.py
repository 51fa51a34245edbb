"""Turns a request into latents on the denoising ranks."""
