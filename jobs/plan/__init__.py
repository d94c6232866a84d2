"""How long a job will take on this device, and what the prediction goes by."""
