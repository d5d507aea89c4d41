"""Image datasets from folders and arrays, and their preprocessing."""
