"""Methods that drop units of A and grow as many others."""
