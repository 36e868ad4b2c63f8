"""Tables, figures and pages of results, and published results."""
