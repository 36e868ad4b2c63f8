"""Tables, figures and pages of results, and the figures that the papers report."""
