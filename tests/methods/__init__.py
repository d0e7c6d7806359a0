"""Tests of the methods and of the primitives they are made of."""
