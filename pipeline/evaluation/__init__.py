"""What a trained model is worth: likelihood, samples, baselines to hold beside them, and pictures."""
