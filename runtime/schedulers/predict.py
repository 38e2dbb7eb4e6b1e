"""The model's output says x0 or noise, as coefficients of (x, model output).

A noisy sample is alpha * x0 + sigma * noise with alpha**2 + sigma**2 = 1; v = alpha * noise - sigma * x0
(arXiv 2202.00512, appendix D). `scale` is what x must be multiplied with to be such a sample: 1, or alpha for solvers
whose x is x0 + sigma / alpha * noise.
"""

from __future__ import annotations


def x0_from(prediction_type: str, alpha: float, sigma: float, scale: float = 1.0) -> tuple[float, float]:
    """Coefficients of the predicted clean sample."""
    if prediction_type == "epsilon":
        return scale / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha * scale, -sigma
    return 0.0, 1.0


def noise_from(prediction_type: str, alpha: float, sigma: float, scale: float = 1.0) -> tuple[float, float]:
    """Coefficients of the predicted noise, which is also the derivative dx/d(sigma / alpha) when scale is alpha."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma * scale, alpha
    return scale / sigma, -alpha / sigma
