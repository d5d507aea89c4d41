"""Post-hoc out-of-distribution scores for PyTorch classifiers, from the last feature map and the last layer alone.

engine = ood_engine.Engine(model).fit(loader).calibrate(fresh_loader)
scores = engine.score(images)        # detector → float32 [N], higher = more in-distribution
flagged = engine.predict(images)     # detector → bool [N], True = out-of-distribution
"""

from . import detectors, subspace
from .detectors import available_detectors
from .engine import Engine
from .errors import OodEngineError, OodEngineWarning
from .evaluation import metrics
from .evaluation.explain import Explanation, explain
from .features.cache import FeatureCache
from .runtime import Runtime
from .scores import Scores
from .version import __version__

__all__ = [
    "Engine",
    "Explanation",
    "FeatureCache",
    "OodEngineError",
    "OodEngineWarning",
    "Runtime",
    "Scores",
    "__version__",
    "available_detectors",
    "detectors",
    "explain",
    "metrics",
    "subspace",
]
