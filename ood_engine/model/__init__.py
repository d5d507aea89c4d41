"""The classifier: discovery of head and feature map, capture of their activations, and loading by name."""
