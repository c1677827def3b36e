"""Training: what is trained when, the loop, and how it goes on after an interruption."""
