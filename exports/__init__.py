"""Writing optimized models for other runtimes."""
