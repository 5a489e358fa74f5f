"""Training: data, tasks, the trainer, run configurations, and a whole run from a configuration."""
