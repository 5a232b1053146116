"""Training: pure losses, roles over one shared base, rollouts through the Engine, checkpoints."""
