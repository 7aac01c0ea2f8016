"""Measures a picture's complexity and the spread of attention: CARVE's analysis.

Source: "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", 2025, arXiv 2509.06461, eq. 3.1-3.3. The
paper names no thresholds for its edges and does not say how the map is normalised; this module's choices are below.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from PIL import Image

from vlmfix.decoders.picture.refined import Array

EDGES = (100, 200)
"""Lower and upper threshold of the Canny edges, on grey values of 0 to 255."""
HUES = 180
"""Hues that OpenCV tells apart."""


def texture_complexity(picture: Image.Image) -> float:
    """Computes the share of an RGB picture's pixels that are Canny edges, in [0, 1]."""
    grey = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2GRAY)
    return float(np.mean(cv2.Canny(grey, *EDGES) > 0))


def colour_complexity(picture: Image.Image) -> float:
    """Computes the entropy of an RGB picture's hues, in [0, 1]: 0 for one hue, 1 for all 180 alike."""
    hue = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2HSV)[..., 0]
    return attention_entropy(np.bincount(hue.ravel(), minlength=HUES).astype(np.float64)) / math.log(HUES)


def attention_entropy(values: Array) -> float:
    """Computes ``-sum a log a`` of a map scaled to the sum 1, in nats: 0 for a single cell, log n for n equal ones.

    Args:
        values: Of any shape, not negative; contrasted or raw attention.
    """
    shares = values[values > 0] / values.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0
