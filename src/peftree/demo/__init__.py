"""The demo: real models, real data, methods of every branch beside full fine-tuning."""
