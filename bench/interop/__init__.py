"""Checkpoints that other tools write and load, held against fewbits: one file a tool, by `harness`, and `compare`.

`environments` installs each tool into an environment of its own; this file must not import anything that one lacks.
"""
