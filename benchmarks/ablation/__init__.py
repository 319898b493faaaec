"""Mixers at equal parameters: the paper's tables for images. Rows and recipes are the YAML files in this folder."""
