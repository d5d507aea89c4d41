"""CPU pooling, in C++ if a compiler is available."""
