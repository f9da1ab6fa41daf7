"""Adaptation methods: the registry that ``--method`` reads."""

from fastuda.methods import asanet, fada, plca, self_training, sepico, source_only, weakseg
from fastuda.methods.base import Method, Phase, SegPrediction
from fastuda.methods.registry import METHODS, get_method, register

__all__ = [
    "METHODS",
    "Method",
    "Phase",
    "SegPrediction",
    "asanet",
    "fada",
    "get_method",
    "plca",
    "register",
    "self_training",
    "sepico",
    "source_only",
    "weakseg",
]
