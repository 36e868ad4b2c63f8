"""What training and evaluation both measure: likelihood, drawn samples, language-model and image figures."""
