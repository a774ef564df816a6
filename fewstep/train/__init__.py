"""Playing an objective's turns: players, the loop, checkpoints and the run folder."""
