"""Adaptation methods: the registry that ``--method`` reads."""

from fastuda.methods import asanet, fada, plca, self_training, sepico, source_only, weakseg
from fastuda.methods.base import Method, Phase, SegPrediction
from fastuda.methods.registry import BASELINE, DEFAULT, METHODS, get_method, register

__all__ = [
    "BASELINE",
    "DEFAULT",
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
