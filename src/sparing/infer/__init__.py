"""Using a trained model: `generate` samples one sequence at a time from a model and its cache."""
