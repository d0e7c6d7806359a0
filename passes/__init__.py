"""The compiler passes, one transformation a file; `tokcompile.api` holds their order."""
