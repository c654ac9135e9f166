"""The rates of the GPU that the time of a picture is estimated for."""

BUS = 25e9
"""Bytes per second from main memory, PCIe 4.0 x16."""
MEMORY = 500e9
"""Bytes per second of the GPU's memory."""
FLOPS = 50e12
"""Operations per second of bf16 products."""
