"""mos: local, steerable image generation with Mixture of States."""

__version__ = "0.1.0"
