"""Methods that keep all weights in training, and choose A among them."""
