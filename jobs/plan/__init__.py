"""Predicting how long a job will take on this device, and showing its prompt lengths."""
