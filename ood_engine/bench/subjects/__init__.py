"""One file a subject: what is computed, at which sizes, and who computes it."""
