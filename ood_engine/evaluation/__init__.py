"""Evaluation of detectors: metrics, tuning, sweeps, explanations and reports."""
