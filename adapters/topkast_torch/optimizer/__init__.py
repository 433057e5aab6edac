"""The wrapper: a ``torch.optim.Optimizer`` around another one, its groups and checkpoints."""
