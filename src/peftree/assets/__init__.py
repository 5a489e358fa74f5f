"""Real pretrained models and real data out of package registries: no model hub, no account."""
