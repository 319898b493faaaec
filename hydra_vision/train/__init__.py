"""Training of image classifiers: recipes as data, any number of processes, checkpoints that resume exactly.

The command line is `hydra_vision.train.main:main`; nothing here is imported by `import hydra_vision`.
"""
