"""What works on every class of transformers: built small from its default config, run, and measured."""
