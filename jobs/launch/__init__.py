"""Starting jobs with Slurm, Ray, cron and systemd."""
