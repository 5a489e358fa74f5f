"""The demo: real pretrained models and real data, out of package registries."""
