"""Adaptation methods: the registry that ``--method`` reads."""

from fastuda.methods import plca, source_only
from fastuda.methods.base import METHODS, Method, Phase, SegPrediction, get_method, register

__all__ = ["METHODS", "Method", "Phase", "SegPrediction", "get_method", "plca", "register", "source_only"]
