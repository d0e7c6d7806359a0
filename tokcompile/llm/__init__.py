"""Language models after a reduced prefill: the decode step, generation, and both as files."""

from tokcompile.llm.decode import decode_graph
from tokcompile.llm.export import export
from tokcompile.llm.folder import load
from tokcompile.llm.generate import Generated, Generator, Sampling
from tokcompile.llm.modules import Prefill

__all__ = ["Generated", "Generator", "Prefill", "Sampling", "decode_graph", "export", "load"]
