"""From which sequence length on a mixer is cheaper than attention."""
