"""How weights are held and stepped: dense under a mask, or on B alone."""
