"""How well detectors do: metrics, evaluation, tuning, sweeps, explanations and reports."""
