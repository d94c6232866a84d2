"""Predicts the cost of a step or a job, from the model's shape and from times measured on this device."""
