"""Jobs that something else starts: Slurm, Ray, cron, systemd."""
