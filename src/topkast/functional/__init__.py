"""The training loop for plain arrays: a wrapped update rule is two pure functions and a state."""
