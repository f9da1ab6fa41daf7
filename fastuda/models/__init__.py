"""Segmentation networks and their weights."""

from fastuda.models.build import ModelConfig, build_model
from fastuda.models.segmentor import Segmentor, SegOutput

__all__ = ["ModelConfig", "SegOutput", "Segmentor", "build_model"]
