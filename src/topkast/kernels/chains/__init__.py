"""Whole passes of one or more sparse layers, each in one parallel region."""
