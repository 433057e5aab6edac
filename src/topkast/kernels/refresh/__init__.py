"""What a refresh does with the entries of B and of its reserve, on all cores."""
