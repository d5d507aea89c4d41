"""ID features: how they are read, kept and handed to what is fitted."""
