"""Images from folders and arrays, and their preprocessing."""
