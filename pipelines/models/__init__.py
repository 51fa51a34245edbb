"""Model code that diffusers lacks: plain modules that know nothing of parallelism."""
