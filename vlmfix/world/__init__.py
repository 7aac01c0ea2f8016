"""The drawn world: scenes of COCO categories with exact ground truth, and the small model trained on it."""
