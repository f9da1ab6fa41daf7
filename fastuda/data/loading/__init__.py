"""Training and evaluation loaders, with sampling and augmentation."""
