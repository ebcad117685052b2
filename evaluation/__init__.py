"""What a world model is worth: energies of actions, the analysis of checkpoints, checks."""
