"""Files of the forward view: saved, and loaded as dense or as sparse layers."""
