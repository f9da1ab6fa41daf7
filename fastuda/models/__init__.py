"""Segmentation networks and their weights."""

from fastuda.models.segmentor import ModelConfig, Segmentor, SegOutput, build_model

__all__ = ["ModelConfig", "SegOutput", "Segmentor", "build_model"]
