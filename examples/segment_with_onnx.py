"""Segment an image with an ONNX file that ``fastuda export`` wrote. fastuda itself is not needed.

Usage: python segment_with_onnx.py MODEL.onnx PICTURE OUT.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, picture: str, out: str) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    image = np.asarray(Image.open(picture).convert("RGB"), np.float32)
    (labels,) = session.run(["labels"], {"image": image.transpose(2, 0, 1)[None]})
    about = json.loads(session.get_modelmeta().custom_metadata_map["fastuda"])
    palette = np.array(about["palette"], np.uint8)
    Image.fromarray(palette[labels[0]]).save(out)
    print(f"{out}: {', '.join(about['classes'][i] for i in np.unique(labels))}")
    return labels[0]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit((__doc__ or "").strip())
    main(*sys.argv[1:])
