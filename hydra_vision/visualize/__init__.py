"""Pictures of what a model computes. Nothing is imported here: matplotlib loads where a picture is drawn."""
