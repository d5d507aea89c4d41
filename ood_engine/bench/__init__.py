"""What `ood-engine bench` measures and how: subjects, providers side by side, rows, pictures and comparisons."""
