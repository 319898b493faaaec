"""Benchmarks of models and of the operator. Nothing here is imported by ``import hydra_vision``."""
