"""Features: loading, caching, and the inputs of detectors and their fits."""
