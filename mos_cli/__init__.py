"""mos: local, steerable image generation with Mixture of States."""

__version__ = "0.2.0"
