"""Metrics from a classifier: inception score, and agreement with the wanted labels."""

from __future__ import annotations

import numpy as np

SPLIT_IMAGES = 5000


def probabilities_from_logits(logits: np.ndarray) -> np.ndarray:
    """Apply softmax to (N, K) logits, float32."""
    shifted = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def inception_score(probabilities: np.ndarray, split_images: int = SPLIT_IMAGES) -> float:
    """``exp(mean KL(p(y|x) || p(y)))``, averaged over splits of 5000 images as in ADM's evaluator.

    Splits are consecutive images and are not shuffled. Images that are sorted by class would score
    far too low, because every split would lack classes.

    Args:
        probabilities: (N, K), rows that sum to 1.
        split_images: number of images in a split; the last split may be smaller.

    Source: Salimans et al., "Improved Techniques for Training GANs", 2016.
    """
    scores = []
    for first in range(0, len(probabilities), split_images):
        part = probabilities[first : first + split_images].astype(np.float64)
        marginal = part.mean(axis=0)
        scores.append(np.exp(_sum_p_log_p(part).mean() - _sum_p_log_p(marginal)))
    return float(np.mean(scores))


def _sum_p_log_p(p: np.ndarray) -> np.ndarray:
    """``sum p log p`` over the last axis, where 0 log 0 is 0."""
    return np.asarray((p * np.log(np.where(p > 0, p, 1))).sum(axis=-1))
