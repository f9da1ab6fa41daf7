"""fastuda: unsupervised domain-adaptive semantic segmentation on fused kernels."""

from pathlib import Path

__version__ = "0.1.0"

# In a clone the kernels lie beside this package, not inside it: let `fastuda.kernels` resolve there too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").exists() and (_checkout / "kernels" / "__init__.py").exists():
    __path__.append(str(_checkout))
