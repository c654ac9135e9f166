"""Open pretrained pipelines of diffusers as generation towers (base models), with a router between them and their text.

The pipeline of diffusers draws; hooks change what its blocks read as text. Nothing changes until a router is trained or
a rule opens a gate.
"""
