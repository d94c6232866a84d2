"""What a step or a job costs: counted from the model's shape, and timed on this device."""
