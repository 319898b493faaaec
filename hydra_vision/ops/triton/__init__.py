"""Fused Triton kernels for the quasiseparable operator and for everything between the mixer's two projections.

``api.py`` is the way in; importing this package imports neither Triton nor CUDA.
"""
