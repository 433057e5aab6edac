"""Training in several processes: what is sent, and whether the sets of replicas agree."""
