"""Benchmarks that need a GPU and SGLang."""
