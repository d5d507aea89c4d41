"""The user's model: its head and feature map, what they see in a forward pass, and models by name."""
