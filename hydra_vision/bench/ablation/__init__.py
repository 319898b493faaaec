"""The mixer ablation: one recipe, one number of parameters, many mixers."""
