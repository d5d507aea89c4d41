"""Pooling on the CPU, in C++ where a compiler is there."""
