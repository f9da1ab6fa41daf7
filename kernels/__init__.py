"""Triton kernels and their launchers, installed as ``fastuda.kernels``: no autograd, no dispatch, no
public name."""
