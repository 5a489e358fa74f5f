"""Plans of Hugging Face PEFT's adapter configs: with its own modules, or as our method that equals one."""
