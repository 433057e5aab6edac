"""Executions store and step the weights of a tensor: dense under a mask, or on B alone."""
