"""A really trained vision transformer and a photograph, both from installed packages: nothing is downloaded."""
