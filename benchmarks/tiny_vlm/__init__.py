"""A small vision-language model trained here, with which token reduction is measured in words: see docs/tiny-vlm.md."""
